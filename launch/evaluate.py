"""Score a finished run again: deepspeed launch/evaluate.py --run runs/quickstart [eval.samples=8 ...]

Or an adapter on a labelled file: python launch/evaluate.py --adapter DIR --data test.jsonl [--diagram reliability.svg]
"""

import argparse
import sys
from functools import partial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="output folder of a finished run")
    what.add_argument("--adapter", help="folder that launch/adapt.py wrote")
    parser.add_argument("--output", help="JSON file for the scores")
    of_run = parser.add_argument_group("a run")
    of_run.add_argument(
        "--settings",
        help="YAML file of named overrides: scores under each go to RUN/scores/NAME, the model loaded once",
    )
    of_run.add_argument("overrides", nargs="*", metavar="section.key=value", help="override keys of the run's config")
    of_adapter = parser.add_argument_group("an adapter")
    of_adapter.add_argument("--data", help="JSONL or CSV file of texts and labels")
    of_adapter.add_argument("--text", help="column of the texts; default: text, or input")
    of_adapter.add_argument("--label", help="column of the labels; default: label, or output")
    of_adapter.add_argument("--samples", type=int, default=0, help="posterior samples to average; 0: the mean")
    of_adapter.add_argument("--calibrated", action="store_true", help="at the temperature of cross-validation")
    of_adapter.add_argument("--diagram", help="file for a reliability diagram: .svg, .png or .pdf")
    of_adapter.add_argument("--model", help="where the base model is now, if its name has moved")
    of_adapter.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of the base's weights; default: the run's"
    )
    of_adapter.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    arguments = parser.parse_intermixed_args()
    foreign = ("data", "text", "label", "samples", "calibrated", "diagram", "model", "dtype", "device")
    if arguments.adapter:
        foreign = ("settings", "overrides")
        if not arguments.data:
            parser.error("--data: name the labelled file that the adapter is scored on")
        if arguments.samples < 0:
            parser.error(f"--samples: {arguments.samples}: must be 0 or more")
    given = [name for name in foreign if getattr(arguments, name)]
    if given:
        parser.error(f"{given[0]}: does not go with {'--adapter' if arguments.adapter else '--run'}")

    if arguments.settings and arguments.output:
        parser.error("--output: does not go with --settings, whose scores go to RUN/scores/NAME")

    if arguments.adapter:  # imports behind the parser: --help should not wait for torch
        from abmll.deploy.exit_status import exit_status
        from abmll.deploy.predict import evaluate_adapter
        from abmll.tasks.labelled import Columns

        command = partial(
            evaluate_adapter,
            arguments.adapter,
            arguments.data,
            output=arguments.output,
            columns=Columns(arguments.text, arguments.label),
            samples=arguments.samples,
            calibrated=arguments.calibrated,
            diagram=arguments.diagram,
            model=arguments.model,
            dtype=arguments.dtype,
            device=arguments.device,
        )
        return exit_status(command)

    from abmll.config import ConfigError, Refused
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
