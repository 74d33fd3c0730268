"""One or several runs as a page: python launch/report.py RUN [RUN ...] [--out FILE]

The page is one HTML file that loads nothing else: learning curves, scores with intervals, calibration, the posterior by
layer, memory and speed, the configuration. docs/report.md says what each part shows.
"""

import argparse
import importlib.util
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a run; several are shown side by side")
    parser.add_argument("--out", help="HTML file; default: RUN/report.html for one run")
    arguments = parser.parse_args()

    if importlib.util.find_spec("matplotlib") is None:
        print("error: the page's figures are drawn by matplotlib; pip install -e '.[report]'", file=sys.stderr)
        return 2
    from abmll.config import ConfigError, Refused  # behind the parser: --help should not wait for torch
    from abmll.page.command import report

    try:
        print(report(arguments.runs, arguments.out))
        return 0
    except (ConfigError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
