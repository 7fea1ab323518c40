"""The gated LoRA: a store of adapters, one low-rank product per module with a gate per row, or a mixture folded in."""

from logo.mixing.activated import NEVER, begins
from logo.mixing.costs import Work
from logo.mixing.folding import Folder
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.mixer import Form, Mixer
from logo.mixing.stacks import Stack
from logo.mixing.store import AdapterStore

__all__ = [
    "NEVER",
    "AdapterStore",
    "Folder",
    "Form",
    "GatedLoRA",
    "Gates",
    "Mixer",
    "Stack",
    "Work",
    "begins",
]
