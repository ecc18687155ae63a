"""Descent from trained weights to a stationary point of the objective; see `newton`."""
