"""Networks of the comparisons."""
