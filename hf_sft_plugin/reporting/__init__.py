"""What a run logged goes in; a log file, curves, a report and a model card come out."""
