"""Rows go in; token ids come out, with a mask that says which of them are trained."""
