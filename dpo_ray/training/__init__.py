"""The train loop and its parts: no Ray."""
