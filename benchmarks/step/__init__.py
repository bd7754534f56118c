"""Measure what a step of SAM costs besides its two passes: see run.py."""
