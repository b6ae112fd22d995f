"""From raw rows to batches: what is trained is decided, checked and counted here."""
