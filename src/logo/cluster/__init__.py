"""What uses Ray: the rows of an evaluation (`workers`), and replicas of vLLM's server (`replicas`)."""
