"""Shared by all tests."""

from __future__ import annotations

import os
import tempfile

# Tiny models gain nothing from threads and lose much to them on a busy machine; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What tests calibrate stays among them.
os.environ["LOGO_CACHE"] = tempfile.mkdtemp(prefix="logo-cache-")
