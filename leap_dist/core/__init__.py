"""The algorithm, with torch alone: gates, thresholds, phases, fragments, the optimizer and its oracle."""
