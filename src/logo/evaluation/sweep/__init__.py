"""Sweeps: one model and pool under every combination of some settings, as one table and pictures.

grid.py     axes, their values, and the names of cells
running.py  every cell through a `logo.evaluation.session.Session`, each dataset resumed as any other run
means.py    means over datasets with intervals, cells drawn alike
table.py    one tidy table of all results, as CSV and as Parquet
plots.py    score against each axis
"""
