"""Loading, sharding, running and exporting models: no data, no Ray."""
