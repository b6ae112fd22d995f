"""The room tokens/; see its README.md."""
