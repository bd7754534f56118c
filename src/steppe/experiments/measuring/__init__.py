"""`steppe measure`: the flatness of the runs of a folder, or of a user's model."""
