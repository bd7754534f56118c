"""Statistics, summaries and verdicts."""
