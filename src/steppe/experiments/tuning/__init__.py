"""`steppe tune`."""
