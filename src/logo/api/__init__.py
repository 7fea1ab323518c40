"""What the servers share: bodies of requests and replies, names of models, errors, guards, log lines."""
