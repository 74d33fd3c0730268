"""Which texts to label next: python launch/suggest.py --adapter DIR --input unlabelled.jsonl --count 4

Prints the rows that the model is least sure of, the least sure first. Before there is an adapter, --run RUN with
--options a b asks the meta-trained model itself.
"""

import argparse
import sys
from functools import partial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--adapter", help="folder that launch/adapt.py wrote")
    whom.add_argument("--run", help="output folder of a finished run; with --options")
    parser.add_argument("--options", nargs="+", help="the task's labels, where there is no adapter yet")
    parser.add_argument("--input", required=True, help="JSONL or CSV file of texts, or - for standard input")
    parser.add_argument("--text", help="column of the texts; default: text, or input")
    parser.add_argument("--count", type=int, default=4, help="rows to print (default: 4)")
    parser.add_argument("--samples", type=int, default=0, help="by the variance of so many samples; 0: by the entropy")
    parser.add_argument("--model", help="where the base model is now, if its name has moved")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the base's weights; default: the run's")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.options is None):
        parser.error("--options: goes with --run, and --run needs it")
    if arguments.options is not None and len(arguments.options) < 2:
        parser.error(f"--options: {arguments.options}: a question has two or more")
    if arguments.samples == 1 or min(arguments.samples, arguments.count - 1) < 0:
        parser.error("--count: at least 1; --samples: 0, or at least 2, as one has no variance")

    from abmll.deploy.exit_status import exit_status  # behind the parser: --help should not wait for torch
    from abmll.deploy.predict import suggest
    from abmll.tasks.labelled import Columns

    command = partial(
        suggest,
        arguments.run,
        arguments.adapter,
        arguments.input,
        columns=Columns(arguments.text),
        count=arguments.count,
        samples=arguments.samples,
        options=arguments.options,
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
