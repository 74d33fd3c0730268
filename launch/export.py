"""Hand an adapter on: python launch/export.py --adapter DIR --format peft --out DIR

peft: files for PeftModel.from_pretrained and vLLM. merged: a Hugging Face model of its own. safetensors: plain tensors.
What is written is loaded back and compared with the adapter first; README.md beside it has the exact prompt.
"""

import argparse
import sys
from functools import partial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", help="folder that launch/adapt.py wrote: the posterior mean of its phi")
    what.add_argument("--run", help="output folder of a finished run: theta's mean, the meta-trained adapter itself")
    parser.add_argument("--format", choices=("peft", "merged", "safetensors"), default="peft", help="default: peft")
    parser.add_argument("--out", required=True, help="folder to write; an earlier export in it is replaced")
    parser.add_argument("--model", help="where the base model is now, if its name has moved")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub, privately")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="of base and merged weights; default: the run's"
    )
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    arguments = parser.parse_args()

    from abmll.deploy.exit_status import exit_status  # behind the parser: --help should not wait for torch
    from abmll.deploy.export.command import export

    command = partial(
        export,
        arguments.adapter,
        arguments.run,
        arguments.format,
        arguments.out,
        model=arguments.model,
        repository=arguments.push,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
