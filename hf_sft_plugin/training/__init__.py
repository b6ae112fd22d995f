"""Everything that touches Trainer, Accelerate, PEFT and evaluate."""
