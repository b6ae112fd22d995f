"""The room evaluation/; see its README.md."""
