"""The room encoding/; see its README.md."""
