"""Datasets, metrics, the run over one dataset, and its result files. Nothing is imported here."""
