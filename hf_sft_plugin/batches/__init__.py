"""Prepared rows go in; batches come out, put together so that no work is done for padding."""
