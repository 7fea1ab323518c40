"""Request and answer bodies that our own server and vLLM with LoGo share."""
