"""`steppe measure`."""
