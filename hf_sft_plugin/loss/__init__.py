"""Hidden states or logits go in; one scalar loss and the sums behind the log come out."""
