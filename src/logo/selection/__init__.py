"""From a prompt to a selection: probe, signal, selector."""

from logo.selection.selector import Selection

__all__ = ["Selection"]
