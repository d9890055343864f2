"""Where runs are recorded for comparison; the one place that imports MLflow."""
