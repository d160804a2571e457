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

    config = commands.add_parser("import-config", help="turn experiment files of the original code into a recipe")
    config.add_argument("--cfg", type=Path, required=True, metavar="S.yaml", help="experiment file of the student")
    config.add_argument("--tcfg", type=Path, metavar="T.yaml", help="experiment file of the teacher")
    config.add_argument("--output", type=Path, metavar="RECIPE.yaml", help="recipe to write (default: print it)")
    config.add_argument("--force", action="store_true", help="replace the recipe where it exists")
    config.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="as the original takes them: TRAIN.LR 0.001 …"
    )
    config.set_defaults(run=_import_config)

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


def _import_config(arguments: argparse.Namespace) -> None:
    from fpd_accel.yacs import import_config, write_recipe

    recipe, text = import_config(arguments.cfg, arguments.overrides, teacher=arguments.tcfg)
    if arguments.output is None:
        sys.stdout.write(text)
        return
    write_recipe(text, arguments.output, force=arguments.force)
    say(f"{arguments.output}: {recipe.run.name}; its comments say what differs, and how to prepare the data")


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
