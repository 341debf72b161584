"""Measurements against transformers, under load, and of exactness; each writes a page into `benchmarks/results`."""
