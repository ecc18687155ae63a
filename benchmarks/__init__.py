"""What `spectra` costs and what its peers cost for the same work: `python -m benchmarks`."""
