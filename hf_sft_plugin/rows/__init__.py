"""A raw row goes in, whatever its columns; a `Conversation` comes out."""
