"""The gated LoRA: one stacked low-rank product per module, with a weight per adapter and row."""

from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.mixer import Mixer
from logo.mixing.working_set import AdapterCache, Stack, WorkingSet

__all__ = ["AdapterCache", "GatedLoRA", "Gates", "Mixer", "Stack", "WorkingSet"]
