"""All measurements that need a GPU, by one resumable command: run.py."""
