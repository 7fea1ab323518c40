"""Requests and replies of LoGo's HTTP API, for our own server and for vLLM with LoGo inside."""
