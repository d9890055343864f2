"""The one place that touches DeepSpeed."""
