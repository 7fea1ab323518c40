"""The plugin that vLLM loads in every process (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging
import os

from logo import plugins
from logo.errors import ModelError, PluginError, UsageError
from logo.vllm.launch import COUNT_NANS, PLUGINS

# Why LoGo is not in this process; None if it is.
refused: str | None = None


def register() -> None:
    """Installs LoGo's patches of vLLM. Engines without a pool are not affected, in any version of vLLM. A server that
    loads our routes counts NaN in logits: vLLM reads this variable before it knows of a pool."""
    from logo.vllm.patches import install

    global refused
    if "logo" in os.environ.get(PLUGINS, "").split(","):
        os.environ.setdefault(COUNT_NANS, "1")
    try:
        plugins.load_installed()
        install()
    except (ModelError, PluginError, UsageError) as error:
        refused = str(error)
        logging.getLogger("vllm.logo").warning("%s", error)
