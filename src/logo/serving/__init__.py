"""The OpenAI-compatible server: HTTP outside, one engine inside."""
