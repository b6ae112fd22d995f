"""Prepared rows go in as a dataset; they come out as files, checked and mapped into memory."""
