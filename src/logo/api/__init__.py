"""What requests and answers say, whoever serves the model: our own server, or vLLM with LoGo inside."""
