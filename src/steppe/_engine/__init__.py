"""Internal: the machinery of one step."""
