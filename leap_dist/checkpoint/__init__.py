"""Checkpoints: saved in the background, complete or not there, read by any number of ranks."""
