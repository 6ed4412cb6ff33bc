"""Direct Preference Optimization on Ray: exact, fast, fault-tolerant, plain to read."""
