"""The first step of a run goes in; figures with their bounds come out, before it is taken."""
