"""Label texts with adapters: python launch/predict.py --adapter DIR [--adapter DIR ...] --input file.jsonl

The input is JSONL or CSV with a column of texts, or `-`: JSONL on standard input. A JSON line comes out for every row:
label, confidence, probability of each option, entropy, and with --samples the spread over posterior samples.
"""

import argparse
import sys
from functools import partial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", action="append", required=True, help="folder that launch/adapt.py wrote")
    parser.add_argument("--input", required=True, help="JSONL or CSV file, or - for standard input")
    parser.add_argument("--output", help="JSONL file; default: standard output")
    parser.add_argument("--text", help="column of the texts; default: text, or input")
    parser.add_argument("--samples", type=int, default=0, help="posterior samples to average; 0: the posterior mean")
    parser.add_argument("--calibrated", action="store_true", help="at the temperature that cross-validation found")
    parser.add_argument("--abstain", type=float, metavar="P", help="leave out the label of what is less sure than P")
    parser.add_argument("--model", help="where the base model is now, if its name has moved")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the base's weights; default: the run's")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    arguments = parser.parse_args()
    if arguments.samples < 0:
        parser.error(f"--samples: {arguments.samples}: must be 0 or more")
    if arguments.abstain is not None and not 0 <= arguments.abstain <= 1:
        parser.error(f"--abstain: {arguments.abstain}: is a probability, from 0 to 1")

    from abmll.deploy.exit_status import exit_status  # behind the parser: --help should not wait for torch
    from abmll.deploy.predict import predict
    from abmll.tasks.labelled import Columns

    command = partial(
        predict,
        arguments.adapter,
        arguments.input,
        output=arguments.output,
        columns=Columns(arguments.text),
        samples=arguments.samples,
        calibrated=arguments.calibrated,
        abstain=arguments.abstain,
        model=arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
