"""Branches of stationary points, followed in the strength of the penalty and through its folds."""
