"""The gated LoRA: adapters on the model's devices, and each row's mixture beside the weights or merged into them."""

from logo.mixing.cache import AdapterCache
from logo.mixing.mixer import Form, Mixer, Mixture

__all__ = ["AdapterCache", "Form", "Mixer", "Mixture"]
