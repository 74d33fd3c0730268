"""Write tasks of the catalogue as JSONL files: python launch/prepare.py --tasks cls23 --out data/crossfit

A task that is there already is skipped, so the same command goes on after an interruption or a failure.
"""

import argparse
import sys
from pathlib import Path

LISTS = Path(__file__).resolve().parents[1] / "configs" / "tasks"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(sorted(path.stem for path in LISTS.glob("*.yaml")))
    parser.add_argument("--tasks", required=True, help=f"a list ({known}), a list file, or names: a,b")
    parser.add_argument("--out", type=Path, default=Path("data/crossfit"), help="the folder that tasks.folder names")
    parser.add_argument("--seed", type=int, default=0, help="of test sets that are set aside, option orders and draws")
    parser.add_argument("--max-examples", type=int, help="examples a split, drawn by the seed (default: all)")
    parser.add_argument("--catalogue", action="append", default=[], metavar="FILE", help="YAML file with more entries")
    arguments = parser.parse_args()
    if arguments.max_examples is not None and arguments.max_examples < 2:
        parser.error(f"--max-examples: {arguments.max_examples}: a task needs 2 examples or more")

    from abmll.tasks.catalogue import load_catalogue  # behind the parser: --help should not wait for torch
    from abmll.tasks.prepare import names_of, prepare, report

    try:
        catalogue = load_catalogue(*arguments.catalogue)
        names = names_of(arguments.tasks, LISTS)
        outcomes = prepare(names, catalogue, arguments.out, arguments.seed, arguments.max_examples)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a task's own is told with the task: this is the folder's
        problem = error.strerror or error
        print(f"error: --out: {arguments.out}: {problem}; name a folder that can be written in", file=sys.stderr)
        return 2
    print(report(outcomes))
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
