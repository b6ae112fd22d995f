"""A whole dataset goes in; prepared rows come out, with an account of every row and token."""
