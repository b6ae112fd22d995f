"""Rows, a model and settings go in; a trained model comes out, with an exact account of the run."""
