"""Internal: the machinery of one step of :class:`steppe.SAM`."""
