"""Measure the contract's statements for Steppe and its installable peers: see run.py."""
