"""From hidden states or logits to one scalar; imports torch and nothing else of the field."""
