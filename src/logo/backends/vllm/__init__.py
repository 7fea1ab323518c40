"""LoGo inside vLLM: a plugin in every process (scores, gates) and a middleware before the app (the router)."""

from logo.backends.vllm.router import Router

__all__ = ["Router"]
