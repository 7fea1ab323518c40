"""From a prompt to a selection: probe, signal, scorer, selector."""
