"""The plugin that vLLM loads in every process (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging

from logo import plugins
from logo.errors import ModelError, PluginError, UsageError

# Why LoGo is not in this process; None if it is.
refused: str | None = None


def register() -> None:
    """Installs LoGo's patches of vLLM. Engines without a pool are not affected, in any version of vLLM."""
    from logo.vllm.patches import install

    global refused
    try:
        plugins.load_installed()
        install()
    except (ModelError, PluginError, UsageError) as error:
        refused = str(error)
        logging.getLogger("vllm.logo").warning("%s", error)
