"""Time and memory of the largest eigenvalue and of the spectral density, compared with other packages: see run.py."""
