"""The gated LoRA: one stacked low-rank product per module, a weight per adapter and row; folded where that pays."""

from logo.mixing.adapter_cache import AdapterCache
from logo.mixing.folding import Folder
from logo.mixing.gated import GatedLoRA, Gates
from logo.mixing.merges import EXACT, Merge
from logo.mixing.mixer import Form, Mixer
from logo.mixing.work import Work
from logo.mixing.working_set import Stack, WorkingSet

__all__ = [
    "EXACT",
    "AdapterCache",
    "Folder",
    "Form",
    "GatedLoRA",
    "Gates",
    "Merge",
    "Mixer",
    "Stack",
    "Work",
    "WorkingSet",
]
