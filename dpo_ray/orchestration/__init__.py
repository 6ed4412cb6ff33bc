"""Everything that runs on Ray; nothing else in the package imports it."""
