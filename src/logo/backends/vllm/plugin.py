"""vLLM loads this by itself in every process (entry point `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Puts LoGo's hooks into vLLM; engines without a pool do not notice."""
    from logo.backends.vllm.hooks import install

    install()
