"""Train and evaluate one run."""
