"""Run folders, checkpoints and files."""
