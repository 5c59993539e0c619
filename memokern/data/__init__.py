"""Training sets: how rows lie in memory, files, sources, the embedded digits."""
