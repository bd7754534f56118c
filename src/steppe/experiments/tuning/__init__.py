"""`steppe tune`: search hyperparameters at equal compute, on a validation set."""
