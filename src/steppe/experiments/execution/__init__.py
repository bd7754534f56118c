"""Where runs are trained, and how their progress is shown."""
