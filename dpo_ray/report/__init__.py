"""A run at a glance: facts from its folder, curves, and one HTML page of them."""
