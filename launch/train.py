"""Meta-train a model: deepspeed launch/train.py --config configs/quickstart.yaml [section.key=value ...]"""

import argparse
import os
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the file")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", choices=["auto"], help="continue from the newest whole checkpoint of the run")
    existing.add_argument("--overwrite", action="store_true", help="replace a run that the output folder holds")
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--validate", action="store_true", help="check everything without training")
    doing.add_argument(
        "--profile",
        action="store_true",
        help="train as usual, and profile an outer step or two behind the first: writes a trace, the largest costs in "
        "time and memory, and on a GPU a memory snapshot to OUTPUT/profile, and says what opens them",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    arguments = parser.parse_intermixed_args()

    from abmll.config import ConfigError, Refused, load_config  # behind the parser: --help should not wait for torch
    from abmll.interrupt import STATUS, Interrupted
    from abmll.slurm import adopt_slurm

    adopt_slurm()
    rank = int(os.environ.get("RANK", 0))
    ended: tuple[type[Exception], ...] = ()  # known once the trainer is imported
    try:
        if arguments.validate:
            from abmll.preflight import preflight

            config = load_config(arguments.config, arguments.overrides)
            report, good = preflight(config, arguments.config, arguments.resume == "auto", arguments.overwrite)
            if rank == 0:
                print(report)
            return 0 if good else 2

        load_config(arguments.config, arguments.overrides)  # a slip should not wait for the imports below
        from abmll.exhausted import Exhausted
        from abmll.run import train
        from abmll.trainer import TrainingDiverged

        ended = (TrainingDiverged, Exhausted)
        train(
            arguments.config,
            arguments.overrides,
            resume=arguments.resume == "auto",
            overwrite=arguments.overwrite,
            profile=arguments.profile,
        )
        return 0
    except ConfigError as error:  # the same on all ranks
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except Refused as error:
        print(f"error (rank {rank}): {error}" if rank else f"error: {error}", file=sys.stderr)
        return 2
    except ended as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        if rank == 0:
            print(f"SIGTERM: {error}; the same command with --resume auto goes on", file=sys.stderr)
        return STATUS


if __name__ == "__main__":
    sys.exit(main())
