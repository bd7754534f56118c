"""Everything that needs a GPU, by one command that can be called again and again: run.py."""
