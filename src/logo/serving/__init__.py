"""The OpenAI-compatible server around one engine."""
