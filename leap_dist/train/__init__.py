"""The training run: loop, evaluation, and what the user sees of it."""
