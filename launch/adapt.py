"""Adapt a run to a task of your own: python launch/adapt.py --run RUN --data my_task.jsonl --out DIR [key=value ...]

The file is JSONL or CSV with a column of texts and one of labels, 4 to 500 examples. A folder's tasks (--tasks) are
adapted side by side over one loaded base.
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="output folder of a finished run, or its summary (RUN/final)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="JSONL or CSV file of one task")
    what.add_argument("--tasks", help="folder of tasks: NAME.jsonl, NAME.csv, NAME.tsv or NAME/train.jsonl each")
    parser.add_argument("--out", required=True, help="folder of the adapter; with --tasks one folder a task in it")
    parser.add_argument("--name", help="the task's name; default: the file's")
    parser.add_argument("--text", help="column of the texts; default: text, or input")
    parser.add_argument("--label", help="column of the labels; default: label, or output")
    parser.add_argument("--examples", type=int, help="draw so many of the examples; default: all")
    parser.add_argument("--folds", type=int, default=4, help="of the cross-validation; 0: none (default: 4)")
    parser.add_argument("--steps", type=int, help="default: the run's, or as many as show every example once")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the run's config")
    arguments = parser.parse_intermixed_args()
    for name in ("examples", "steps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name}: {getattr(arguments, name)}: must be at least 1")
    if arguments.name and arguments.tasks:
        parser.error("--name: goes with --data; a folder's tasks have their files' names")
    if arguments.folds < 0 or arguments.folds == 1:
        parser.error(f"--folds: {arguments.folds}: must be 0, or at least 2")

    from abmll.deploy.adapt import adapt, name_files  # behind the parser: --help should not wait for torch
    from abmll.deploy.exit_status import exit_status
    from abmll.tasks.labelled import Columns

    def command() -> None:
        files, into = name_files(arguments.data, arguments.tasks, arguments.out, arguments.name)
        adapt(
            arguments.run,
            files,
            into,
            columns=Columns(arguments.text, arguments.label),
            examples=arguments.examples,
            folds=arguments.folds,
            steps=arguments.steps,
            overrides=arguments.overrides,
            device=arguments.device,
        )

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
