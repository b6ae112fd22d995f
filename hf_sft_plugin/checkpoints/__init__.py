"""A run that was stopped goes in; the run that was never stopped comes out, to the last bit."""
