"""The room rows/; see its README.md."""
