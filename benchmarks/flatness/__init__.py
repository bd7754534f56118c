"""Time and memory of the largest eigenvalue and of the spectral density, beside other packages: see run.py."""
