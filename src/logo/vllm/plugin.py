"""The plugin that vLLM loads in every process (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging
import os
import sys

from logo import plugins
from logo.errors import ModelError, PluginError, UsageError
from logo.vllm.launch import COUNT_NANS, PLUGINS
from logo.vllm.modules import lora_modules
from logo.vllm.options import MODULES

# Why LoGo is not in this process; None if it is.
refused: str | None = None


def register() -> None:
    """Installs LoGo's patches of vLLM. Engines without a pool are not affected, in any version of vLLM. A server that
    loads our routes counts NaN in logits, and takes the adapters of `--lora-modules` into its pool: vLLM reads these
    before it knows of a pool."""
    from logo.vllm.patches import install

    global refused
    try:
        if "logo" in os.environ.get(PLUGINS, "").split(","):
            os.environ.setdefault(COUNT_NANS, "1")
            modules, _ = lora_modules(sys.argv[1:])
            if modules:  # in the server's process, before it starts others, which inherit the variable
                os.environ[MODULES] = ",".join(modules)
        plugins.load_installed()
        install()
    except (ModelError, PluginError, UsageError) as error:
        refused = str(error)
        logging.getLogger("vllm.logo").warning("%s", error)
