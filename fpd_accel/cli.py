"""``fpd-accel <command>``: what happens before and after training. Training itself is ``recipes/distill.py``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fpd_accel.errors import DataError, UserError
from fpd_accel.log import fail, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 2 and a message without a traceback for anything a user can get wrong."""
    parser = argparse.ArgumentParser(prog="fpd-accel", description="Fast Pose Distillation: data, predictions.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    synth = commands.add_parser("synth", help="draw synthetic people as a COCO keypoint dataset")
    synth.add_argument("output", type=Path, help="folder to write: images/ and person_keypoints.json")
    synth.add_argument("--images", type=int, default=1500)
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--workers", type=int, default=2, help="drawing processes (default: 2)")
    synth.set_defaults(run=_synth)

    prepare = commands.add_parser("prepare", help="turn a COCO keypoint JSON and its images into shards")
    prepare.add_argument("--images", type=Path, required=True, help="folder of the images")
    prepare.add_argument("--annotations", type=Path, required=True, help="COCO keypoint JSON")
    prepare.add_argument("--output", type=Path, required=True, help="folder to write")
    prepare.add_argument(
        "--skeleton", default="coco", help="coco (default), or a YAML file like recipes/skeletons/lsp.yaml"
    )
    prepare.add_argument("--category", help="name of the category, where several have keypoints")
    prepare.set_defaults(run=_prepare)

    predict = commands.add_parser("predict", help="find the keypoints of people in images")
    predict.add_argument("images", nargs="+", type=Path, help="image files")
    predict.add_argument("--model", required=True, help="model folder, such as runs/quickstart/best")
    predict.add_argument("--output", type=Path, required=True, help="folder for keypoints.json and overlays")
    predict.add_argument(
        "--boxes", type=Path, help="JSON: file name -> [[x, y, width, height], ...]; default: whole images"
    )
    predict.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    predict.set_defaults(run=_predict)

    convert = commands.add_parser("import-weights", help="turn a published checkpoint into a model folder")
    convert.add_argument("source", type=Path, help=".pth, .pt, .tar, .safetensors, or a folder with model.safetensors")
    convert.add_argument("--output", type=Path, required=True, help="model folder to make")
    convert.add_argument("--arch", help="the network; default: told by names and shapes of the tensors")
    convert.add_argument("--skeleton", default="coco", help="coco (default) or a YAML file: what the keypoints are")
    convert.add_argument(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels; default: what the weights or the file's name say, else 256 192",
    )
    convert.add_argument(
        "--color",
        choices=("rgb", "bgr"),
        default="rgb",
        help="channel order that it was trained on (default: rgb; published MPII networks of the FPD repository: bgr)",
    )
    convert.add_argument(
        "--verify", type=Path, metavar="DIR", help="folder of fixtures to compare a checkpoint of the original with"
    )
    convert.set_defaults(run=_import_weights)

    info = commands.add_parser("info", help="what a model folder holds and what it costs")
    info.add_argument("folder", type=Path, help="model folder, such as runs/quickstart/best")
    info.set_defaults(run=_info)

    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except UserError as error:
        return fail(error)
    return 0


def _synth(arguments: argparse.Namespace) -> None:
    from fpd_accel.data.synthetic import draw_dataset

    draw_dataset(arguments.output, images=arguments.images, seed=arguments.seed, workers=arguments.workers)
    say(f"{arguments.output}: {arguments.images} images; next: fpd-accel prepare --images {arguments.output}/images "
        f"--annotations {arguments.output}/person_keypoints.json --output SHARDS")  # fmt: skip


def _prepare(arguments: argparse.Namespace) -> None:
    from fpd_accel.data.coco import SKIPPED, prepare_coco
    from fpd_accel.skeleton import load_skeleton

    shards = prepare_coco(
        images=arguments.images,
        annotations=arguments.annotations,
        output=arguments.output,
        skeleton=load_skeleton(arguments.skeleton),
        category=arguments.category,
    )
    counts = shards.description["counts"]
    say(f"{shards.path}: {counts['images']} images, {counts['people']} annotations, {counts['usable']} usable")
    for key, count in shards.description["skipped"].items():
        say(f"  skipped {count} {SKIPPED[key]}")
    for reason, count in shards.description["unused"].items():
        say(f"  kept for evaluation only: {count} ({reason.replace('_', ' ')})")


def _predict(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fpd_accel.predict import Predictor, read_image, whole_image
    from fpd_accel.visualize import save_picture

    boxes = _read_boxes(arguments.boxes) if arguments.boxes is not None else None
    predictor = Predictor(arguments.model, device=arguments.device)
    people = []
    for path in arguments.images:
        image = read_image(path)
        own = [whole_image(image)] if boxes is None else boxes.get(path.name, [])
        poses = predictor(image, np.asarray(own, dtype=np.float64).reshape(-1, 4))
        save_picture(arguments.output / f"{path.stem}.png", predictor.draw(image, poses))
        for box, keypoints, scores in zip(own, poses.keypoints, poses.scores, strict=True):
            triples = np.concatenate([keypoints, scores[:, None]], axis=1)
            people.append({"file_name": path.name, "bbox": list(box), "keypoints": triples.round(3).ravel().tolist()})
    (arguments.output / "keypoints.json").write_text(json.dumps(people), encoding="utf-8")
    say(f"{arguments.output}: {len(people)} people in {len(arguments.images)} images")


def _import_weights(arguments: argparse.Namespace) -> None:
    from fpd_accel.import_weights import import_weights
    from fpd_accel.report import describe_model

    imported = import_weights(
        arguments.source,
        arguments.output,
        arch=arguments.arch,
        skeleton=arguments.skeleton,
        input_size=tuple(arguments.input_size) if arguments.input_size else None,
        color=arguments.color,
        verify=arguments.verify,
    )
    config = imported.config
    say(describe_model(str(arguments.output), config))
    say(f"  {config.input_size[0]} x {config.input_size[1]} (height x width), {config.normalization.color}, "
        f"skeleton {config.skeleton.name}")  # fmt: skip


def _info(arguments: argparse.Namespace) -> None:
    from fpd_accel.report import show_model

    show_model(arguments.folder)


def _read_boxes(path: Path) -> dict[str, list[list[float]]]:
    try:
        boxes = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(boxes, dict) or any(
        not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box)
        for entry in boxes.values()
        for box in entry
    ):
        raise DataError(f"{path}: wanted a mapping from file name to a list of [x, y, width, height]")
    return boxes


if __name__ == "__main__":
    sys.exit(main())
