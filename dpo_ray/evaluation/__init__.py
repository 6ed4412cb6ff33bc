"""Is the model better, and by how much: statistics, held-out pairs, answers side by side."""
