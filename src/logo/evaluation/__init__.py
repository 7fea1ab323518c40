"""Datasets, metrics, the evaluation of a dataset, and its result files. Importing this imports nothing else."""
