"""The room batches/; see its README.md."""
