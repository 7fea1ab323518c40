"""From a prompt to a selection: probe, signal, selector."""
