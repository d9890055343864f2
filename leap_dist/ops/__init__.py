"""The hot loops, each with one plain-torch definition."""
