"""Rows go in; what training would learn from them comes out, readable, before a GPU is paid for."""
