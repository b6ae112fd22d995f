"""Turns rows into token and mask files: `python recipes/prepare_dataset.py --input_files ...`.

`hf-sft prepare` does the same where only the wheel is installed.
"""

import logging
import sys

from hf_sft_plugin import parse_prepare_arguments, prepare_files, visible_lines


def main() -> None:
    """Runs the recipe."""
    files, options = parse_prepare_arguments(sys.argv[1:], prog="python recipes/prepare_dataset.py")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        prepare_files(files, options)
    except (ValueError, OSError) as error:
        # What is wrong with settings, rows or files is said there; a traceback would only hide it.
        raise SystemExit(visible_lines(f"prepare_dataset.py: {error}")) from None


if __name__ == "__main__":
    main()
