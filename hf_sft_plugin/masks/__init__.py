"""The room masks/; see its README.md."""
