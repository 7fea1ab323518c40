"""LoGo inside vLLM: a plugin in every process (scores, gates) and a middleware before the app (the router)."""
