"""Score a finished run again: deepspeed launch/evaluate.py --run runs/quickstart [eval.samples=8 ...]"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of a finished run")
    parser.add_argument("--output", help="JSON file for the scores")
    parser.add_argument(
        "--settings",
        help="YAML file of named overrides: scores under each go to RUN/scores/NAME, the model loaded once",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the run's config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    arguments = parser.parse_intermixed_args()

    from abmll.config import ConfigError, Refused  # behind the parser: --help should not wait for torch
    from abmll.exhausted import Exhausted
    from abmll.rescore import evaluate

    try:
        evaluate(arguments.run, arguments.overrides, arguments.output, arguments.settings)
        return 0
    except (ConfigError, Refused) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exhausted as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
