"""Measures training with hf_sft_plugin against others: `python recipes/benchmark --help`."""

import sys
from pathlib import Path

# The models of the benchmarks are those of the recipes, one folder up.
sys.path.append(str(Path(__file__).parent.parent))

from commands import main

if __name__ == "__main__":
    main()
