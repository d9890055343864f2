"""What transformers models look like: loading, and which of their tensors can be pruned."""
