"""The gated LoRA: adapters in a store, one low-rank product per module, a weight per adapter and row; folded where that
pays."""

from logo.mixing.activated import NEVER, begins
from logo.mixing.costs import Work
from logo.mixing.folding import Folder
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.merges import EXACT, Merge
from logo.mixing.mixer import Form, Mixer
from logo.mixing.stacks import Stack
from logo.mixing.store import AdapterStore

__all__ = [
    "EXACT",
    "NEVER",
    "AdapterStore",
    "Folder",
    "Form",
    "GatedLoRA",
    "Gates",
    "Merge",
    "Mixer",
    "Stack",
    "Work",
    "begins",
]
