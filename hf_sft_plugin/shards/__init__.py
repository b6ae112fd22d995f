"""The room shards/; see its README.md."""
