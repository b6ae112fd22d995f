"""The room preview/; see its README.md."""
