"""Storage: run folders, records, checkpoints and files."""
