"""Tasks: a model, its data, loss and metrics; the user's own, and the built-in ones on images."""
