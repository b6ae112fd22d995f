"""A model and held-out rows go in; exact figures and generated responses come out."""
