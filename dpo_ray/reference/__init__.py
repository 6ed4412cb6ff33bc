"""The reference plane: scores of a frozen model, and the store that they live in."""
