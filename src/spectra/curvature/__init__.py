"""Curvature of a loss: operators that give products, and solvers that only see products."""
