"""The room models/; see its README.md."""
