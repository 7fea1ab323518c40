"""The gated LoRA: adapters on the model's devices, and each row's mixture beside the weights or merged into them."""

from logo.mixing.cache import AdapterCache
from logo.mixing.mixer import PASS, Mixer, Mixture

__all__ = ["PASS", "AdapterCache", "Mixer", "Mixture"]
