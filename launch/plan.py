"""Count a run's memory before paying for it: python launch/plan.py --config configs/cls23.yaml [section.key=value ...]

Runs the configured step on fake tensors, as a GPU would run it, without one and without the model's weights.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--ranks", type=int, default=8, help="also for so many GPUs (default: 8)")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu", help="what the run is planned for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the file")
    arguments = parser.parse_intermixed_args()
    if arguments.ranks < 1:
        parser.error(f"--ranks: {arguments.ranks}: must be at least 1")

    from abmll.config import ConfigError, load_config  # behind the parser: --help should not wait for torch

    try:
        config = load_config(arguments.config, arguments.overrides)
        from abmll.memory.command import show_plan

        return 0 if show_plan(config, arguments.config, arguments.ranks, arguments.device == "gpu") else 1
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
