"""Text goes in; token ids that know their characters come out, and ids go back to text."""
