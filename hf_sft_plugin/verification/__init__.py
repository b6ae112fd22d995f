"""The room verification/; see its README.md."""
