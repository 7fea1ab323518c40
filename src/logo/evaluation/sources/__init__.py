"""Where datasets come from: declarations, and how rows are made of a source's own files. Nothing is imported here."""
