"""Data sets of the comparisons."""
