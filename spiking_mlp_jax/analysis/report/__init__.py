"""The HTML report of a trained network."""
