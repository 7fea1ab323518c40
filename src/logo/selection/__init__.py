"""From a prompt to a selection: probe, signal, selector."""

from logo.selection.index import ScoringIndex
from logo.selection.points import Point, find_points
from logo.selection.probe import Probe
from logo.selection.selector import Selection, Selector
from logo.selection.signals import SIGNALS, get_signal

__all__ = ["SIGNALS", "Point", "Probe", "ScoringIndex", "Selection", "Selector", "find_points", "get_signal"]
