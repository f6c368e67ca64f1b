"""The digits study's page: main table, forgetting, all parts together.

python scripts/digits_study.py        # after its runs: scripts/digits_study.sh makes them
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from reporting.digits import write_page

from run_utils import OneLineErrorParser
from utils import format_error, one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = OneLineErrorParser(prog="digits_study.py", description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(), help="folder of all its folders (.)")
    args, extra = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    try:
        print(write_page(args.root, extra))
        return 0
    except (ValueError, OSError) as error:
        print(one_line(f"digits_study.py: error: {format_error(error)}"), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
