"""Arguments of the command `hf-sft` go in; calls into the rooms come out, and what they print."""
