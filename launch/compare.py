"""Compare methods: python launch/compare.py --config configs/compare/tiny.yaml [section.key=value ...]"""

import argparse
import importlib.util
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the comparison")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a GPU, or one a core")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of each run")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_const", const="list", dest="only", help="print the runs, and stop")
    only.add_argument(
        "--analysis", action="store_const", const="analysis", dest="only", help="tables and plots of what is there"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="override keys of all runs; output=FOLDER: of the comparison",
    )
    arguments = parser.parse_intermixed_args()

    if importlib.util.find_spec("matplotlib") is None:
        print("error: comparisons are plotted by matplotlib; pip install -e '.[compare]'", file=sys.stderr)
        return 2
    from abmll.compare.command import compare  # behind the parser: --help should not wait for torch
    from abmll.config import ConfigError, Refused

    launch = Path(__file__).resolve().parent
    try:
        return compare(
            arguments.config, arguments.overrides, launch, arguments.workers, arguments.ranks, arguments.only
        )
    except (ConfigError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
