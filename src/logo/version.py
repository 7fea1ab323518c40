"""The version of the package."""

__version__ = "0.4.0"  # the only place; pyproject.toml reads it from here
