"""The command that evaluates a model folder: `recipes/evaluate.py`. Checks its arguments before it imports torch."""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fpd_accel.config.loading import load_section
from fpd_accel.config.schema import Evaluate
from fpd_accel.console import fail
from fpd_accel.errors import UserError
from fpd_accel.files import prepare_file, write_whole

DESCRIPTION = """\
Score a model folder on prepared people by COCO's protocol, and by MPII's if the people have head sizes.

accelerate launch recipes/evaluate.py --model runs/quickstart/best --data runs/synthetic/valid
accelerate launch recipes/evaluate.py --model FOLDER --data data/coco/val2017 --boxes detections.json nms=soft

Without --boxes people are cropped by their annotated boxes, which is easier than with a detector's boxes.
key=value sets any key of the section `evaluate` of a recipe, such as box_threshold, nms_threshold or refine.
"""
REMOVED = ("box-threshold", "nms", "nms-threshold", "scales", "keypoint-threshold", "refine", "stages")


class _Removed(argparse.Action):
    """A flag of version 0.1 that is answered with the option that replaces it."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: Any, flag: str | None = None) -> NoReturn:
        if self.nargs == 0:
            value = str(not str(flag).startswith("--no-")).lower()
        elif self.dest == "scales":
            value = f"[{','.join(values)}]"
        else:
            value = " ".join(values) or "VALUE"
        parser.error(f"{flag}: removed in 0.2: write {self.dest}={shlex.quote(value)} instead")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json and model.safetensors")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="written by fpd-accel prepare")
    parser.add_argument(
        "--boxes", metavar="FILE.json", help="a detector's boxes in COCO's result format; see fpd-accel detect"
    )
    parser.add_argument("--flip-test", action=argparse.BooleanOptionalAction, help="default: on")
    parser.add_argument("--batch", type=int, help="people per forward pass on one rank (default: 32)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes per rank (default: 2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="people found, in COCO's result format")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe's section evaluate")
    for flag in REMOVED:
        parser.add_argument(f"--{flag}", action=_Removed, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--flip-shift", "--no-flip-shift", action=_Removed, nargs=0, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 0, or 2 with a message for anything that a user can correct."""
    parser = _parser()
    chosen = parser.parse_intermixed_args(arguments)
    if chosen.workers < 0 or (chosen.batch is not None and chosen.batch < 1):
        parser.error("--batch is at least 1 and --workers at least 0")
    flags = ("boxes", "flip_test", "batch")
    values = {name: value for name in flags if (value := getattr(chosen, name)) is not None}
    try:
        options = load_section(Evaluate, chosen.overrides, source="recipes/evaluate.py", values=values)
        if chosen.output is not None:
            prepare_file(chosen.output)
        from fpd_accel.distributed.accelerator import shutdown
        from fpd_accel.evaluation.folder import evaluate_folder

        score, people = evaluate_folder(
            chosen.model, chosen.data, options=options, workers=chosen.workers, precision=chosen.precision
        )
        if chosen.output is not None and score is not None:
            write_whole(chosen.output, json.dumps(people))
        shutdown()
    except UserError as error:
        return fail(error)
    return 0
