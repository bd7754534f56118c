"""Executors: train runs in this process, in worker processes or on Ray, and display their progress."""
