"""The room checkpoints/; see its README.md."""
