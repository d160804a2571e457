"""Score a model folder on prepared people by COCO's protocol, and by MPII's where head sizes are known.

accelerate launch recipes/evaluate.py --model runs/quickstart/best --data runs/synthetic/valid --flip-test
"""

import argparse
import json
import sys
from pathlib import Path

from fpd_accel.errors import UserError
from fpd_accel.log import fail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json and model.safetensors")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="written by fpd-accel prepare")
    parser.add_argument("--flip-test", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument("--batch", type=int, default=32, help="people per forward on one rank (default: 32)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes per rank (default: 2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="people found, in COCO's result format")
    arguments = parser.parse_args()
    if arguments.batch < 1 or arguments.workers < 0:
        parser.error("--batch is at least 1 and --workers at least 0")
    try:
        from fpd_accel.run import evaluate_folder

        score, people = evaluate_folder(
            arguments.model,
            arguments.data,
            flip_test=arguments.flip_test,
            batch=arguments.batch,
            workers=arguments.workers,
            precision=arguments.precision,
        )
        if arguments.output is not None and score is not None:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(people), encoding="utf-8")
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
