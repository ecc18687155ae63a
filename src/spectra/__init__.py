"""Spectral geometry of neural loss landscapes under L2 regularisation."""

__version__ = "0.1.0"
