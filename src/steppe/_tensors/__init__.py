"""Internal: lists of tensors, sharded or not, and random numbers."""
