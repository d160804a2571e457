"""Score a model folder on prepared people by COCO's protocol, and by MPII's where head sizes are known.

accelerate launch recipes/evaluate.py --model runs/quickstart/best --data runs/synthetic/valid --flip-test
accelerate launch recipes/evaluate.py --model FOLDER --data data/coco/val2017 --boxes detections.json

Without --boxes people are cropped by their annotated boxes, which is easier than what a detector gives.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from fpd_accel.config import Evaluate
from fpd_accel.errors import UserError
from fpd_accel.files import prepare_file, write_whole
from fpd_accel.log import fail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json and model.safetensors")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="written by fpd-accel prepare")
    parser.add_argument(
        "--boxes", metavar="FILE.json", help="a detector's boxes, COCO result format; see fpd-accel detect"
    )
    parser.add_argument("--box-threshold", type=float, default=0.0, help="lowest score of a box to use (default: 0)")
    parser.add_argument("--nms", choices=("hard", "soft", "none"), default="hard", help="OKS-NMS (default: hard)")
    parser.add_argument("--nms-threshold", type=float, default=0.9, help="OKS, 0 to 1 (default: 0.9)")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        help="of the region cropped, 1 among them; heatmaps are averaged",
    )
    parser.add_argument("--flip-test", action=argparse.BooleanOptionalAction, default=True, help="default: on")
    parser.add_argument(
        "--flip-shift",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="move the mirrored heatmaps by one cell, as the published protocol does (default: on)",
    )
    parser.add_argument(
        "--keypoint-threshold", type=float, default=0.2, help="a keypoint's least part in a score (default: 0.2)"
    )
    parser.add_argument(
        "--refine",
        choices=("none", "quarter", "dark"),
        help="step below a heatmap cell (default: the network's codec's)",
    )
    parser.add_argument(
        "--stages", choices=("last", "mean"), default="last", help="of a network with several (default: last)"
    )
    parser.add_argument("--batch", type=int, default=32, help="people per forward on one rank (default: 32)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes per rank (default: 2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="people found, in COCO's result format")
    arguments = parser.parse_args()
    if arguments.batch < 1 or arguments.workers < 0:
        parser.error("--batch is at least 1 and --workers at least 0")
    if not math.isfinite(arguments.box_threshold):
        parser.error("--box-threshold is a finite number")
    if not 0 <= arguments.keypoint_threshold <= 1:
        parser.error("--keypoint-threshold is from 0 to 1")
    if not 0 < arguments.nms_threshold <= 1:
        parser.error("--nms-threshold is above 0 and at most 1")
    if 1.0 not in arguments.scales or not all(0 < scale < math.inf for scale in arguments.scales):
        parser.error("--scales are positive numbers, 1 among them")
    options = Evaluate(
        scales=tuple(arguments.scales),
        flip_shift=arguments.flip_shift,
        keypoint_threshold=arguments.keypoint_threshold,
        refine=arguments.refine,
        stages=arguments.stages,
        flip_test=arguments.flip_test,
        batch=arguments.batch,
        boxes=arguments.boxes,
        box_threshold=arguments.box_threshold,
        nms=arguments.nms,
        nms_threshold=arguments.nms_threshold,
    )
    try:
        if arguments.output is not None:
            prepare_file(arguments.output)
        from fpd_accel.processes import leave
        from fpd_accel.run import evaluate_folder

        score, people = evaluate_folder(
            arguments.model,
            arguments.data,
            options=options,
            workers=arguments.workers,
            precision=arguments.precision,
        )
        if arguments.output is not None and score is not None:
            write_whole(arguments.output, json.dumps(people))
        leave()
    except UserError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
