"""Statistics, summaries and verdicts, from records alone."""
