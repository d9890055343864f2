"""What pruning costs: a forecast from shapes, and measurements of step time, selection and traffic."""
