"""vLLM loads this by itself in every process (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging

from logo.errors import ModelError

# Why LoGo is not in this process; None if it is.
refused: str | None = None


def register() -> None:
    """Puts LoGo's hooks into vLLM; engines without a pool do not notice, not even in a vLLM that LoGo does not know."""
    from logo.backends.vllm.hooks import install

    global refused
    try:
        install()
    except ModelError as error:
        refused = str(error)
        logging.getLogger("vllm.logo").warning("%s", error)
