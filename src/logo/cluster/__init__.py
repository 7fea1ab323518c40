"""What uses Ray: the rows of an evaluation (`workers`, `rows`), and replicas of vLLM's server (`replicas`)."""
