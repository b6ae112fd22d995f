"""The room preparation/; see its README.md."""
