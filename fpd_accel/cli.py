"""The command line `fpd-accel <command>`: data, predictions, weights and benchmarks around training.

Training itself is `recipes/distill.py`. Each command imports what it needs when it runs, so that help is instant.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from fpd_accel.bench.commands import add_commands
from fpd_accel.console import fail, say
from fpd_accel.errors import DataError, UserError, WeightsError

Option = Callable[..., Any]  # `ArgumentParser.add_argument`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 after a message without a traceback for anything a user can get wrong."""
    parser = create_parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    try:
        chosen.run(chosen)
    except UserError as error:
        return fail(error)
    return 0


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fpd-accel",
        description="Fast Pose Distillation: prepare data, find keypoints, import weights, measure speed.",
        epilog="Training is `accelerate launch recipes/distill.py --config RECIPE.yaml`.",
    )
    version = f"fpd-accel {metadata.version('fpd-accel')}"
    parser.add_argument("--version", action="version", version=version, help="show the version")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, add_arguments, run, text in COMMANDS:
        command = commands.add_parser(name, help=text)
        add_arguments(command.add_argument)
        command.set_defaults(run=run)
    add_commands(commands.add_parser("bench", help="measure what training costs on this machine"))
    return parser


def _add_synth(add: Option) -> None:
    add("output", type=Path, help="folder to write: images/ and person_keypoints.json")
    add("--images", type=int, default=1500, help="number of images (default: 1500)")
    add("--seed", type=int, default=0, help="equal seeds draw equal images (default: 0)")
    add("--workers", type=int, default=2, help="drawing processes (default: 2)")


def _add_prepare(add: Option) -> None:
    add("--images", type=Path, required=True, help="folder of the images")
    add("--annotations", type=Path, required=True, help="COCO keypoint JSON; MPII: HRNet's JSON, or MPII's own .mat")
    add("--output", type=Path, required=True, help="folder to write")
    add("--format", choices=("coco", "mpii"), default="coco", help="of the annotations (default: coco)")
    add("--skeleton", help="coco (default), mpii, or a YAML file like recipes/skeletons/lsp.yaml; for format coco")
    add("--category", help="name of the category, where several have keypoints; for format coco")
    words = "HRNet's gt_valid.mat for its valid.json: head sizes for PCKh; for format mpii"
    add("--ground-truth", type=Path, help=words)
    words = "keep images without an annotated person, where detections count as false alarms (COCO's protocol)"
    add("--keep-empty-images", action="store_true", help=words)


def _add_detect(add: Option) -> None:
    add("images", type=Path, help="folder of the images")
    add("--output", type=Path, required=True, help="JSON to write, in COCO's result format")
    add("--annotations", type=Path, help="COCO JSON with the ids of the images (default: the number in each file name)")
    words = "file for torchvision's fasterrcnn_resnet50_fpn_v2 (default: download the published weights)"
    add("--weights", type=Path, help=words)
    add("--threshold", type=float, default=0.05, help="lowest score of a box (default: 0.05)")
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--batch", type=int, default=1, help="images per forward (default: 1); padding moves boxes a little")


def _add_check(add: Option) -> None:
    add("data", help="shards written by `prepare`, or folder or URL written by `publish`")
    add("--output", type=Path, metavar="PICTURE.png", help="contact sheet of labelled people to write")
    add("--json", type=Path, metavar="FILE", help="file for the whole report as JSON")


def _add_publish(add: Option) -> None:
    add("data", metavar="SHARDS", help="written by `prepare`")
    add("output", help="folder to make, or a URL: hf://datasets/USER/NAME, s3://BUCKET/NAME, ...")
    add("--group", type=int, default=128, help="images per row group, the unit that a stream fetches (default: 128)")
    add("--file-size", type=int, default=256, help="approximate megabytes per file (default: 256)")


def _add_predict(add: Option) -> None:
    add("images", nargs="+", type=Path, help="image files")
    add("--model", required=True, help="model folder, such as runs/quickstart/best")
    add("--output", type=Path, required=True, help="folder for keypoints.json and overlays")
    words = "JSON written by `detect`, or file name -> [[x, y, width, height], ...] (default: whole images)"
    add("--boxes", type=Path, help=words)
    add("--device", default="cpu", help="torch device (default: cpu)")


def _add_import_weights(add: Option) -> None:
    add("source", type=Path, help=".pth, .pt, .tar, .safetensors, or a folder with model.safetensors")
    add("--output", type=Path, required=True, help="model folder to make")
    add("--arch", help="architecture (default: recognised by names and shapes of the tensors)")
    add("--skeleton", default="coco", help="coco, mpii or a YAML file (default: coco)")
    words = "pixels (default: by the weights or the file's name, else 256 192; Hourglass and MPII: 256 256)"
    add("--input-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=words)
    words = "bgr for Hourglass and PoseResNet of the HRNet and FPD repositories, else rgb"
    add("--color", choices=("rgb", "bgr"), help=f"channel order of the training images (default: {words})")
    add("--verify", nargs="?", const="", metavar="DIR", help=argparse.SUPPRESS)
    words = "udp for ViTPose; udp or dark where an MMPose file's name says so; else heatmap"
    add("--codec", choices=("heatmap", "dark", "udp"), help=f"codec of the training (default: {words})")
    words = "of the training heatmaps, in cells (default: 3 for heights of at least 384, else 2; ViTPose: 2)"
    add("--sigma", type=float, help=words)
    words = "0 to 1; bgr: in the order B G R (default: a transformers folder's, else ImageNet's)"
    for name, role in (("--mean", "subtracted from the channels"), ("--std", "that the channels are divided by")):
        add(name, type=float, nargs=3, metavar=("R", "G", "B"), help=f"values {role}, {words}")


def _add_info(add: Option) -> None:
    add("folder", type=Path, help="model folder, such as runs/quickstart/best")


def _add_import_config(add: Option) -> None:
    add("--cfg", type=Path, required=True, metavar="S.yaml", help="experiment file of the student")
    add("--tcfg", type=Path, metavar="T.yaml", help="experiment file of the teacher")
    add("--output", type=Path, metavar="RECIPE.yaml", help="recipe to write (default: print it)")
    add("--force", action="store_true", help="replace the recipe if it exists")
    add("overrides", nargs="*", metavar="KEY VALUE", help="overrides as the original takes them: TRAIN.LR 0.001 ...")


def _chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some of the options by name, to pass on as keyword arguments."""
    return {name: getattr(arguments, name) for name in names}


def _synth(arguments: argparse.Namespace) -> None:
    from fpd_accel.synthetic.dataset import draw_dataset

    draw_dataset(arguments.output, images=arguments.images, seed=arguments.seed, workers=arguments.workers)
    say(f"{arguments.output}: {arguments.images} images; next: fpd-accel prepare --images {arguments.output}/images "
        f"--annotations {arguments.output}/person_keypoints.json --output SHARDS")  # fmt: skip


def _prepare(arguments: argparse.Namespace) -> None:
    from fpd_accel.data.coco import COCO_SKIPPED, prepare_coco
    from fpd_accel.data.mpii import MPII_SKIPPED, prepare_mpii
    from fpd_accel.skeleton import load_skeleton

    is_mpii = arguments.format == "mpii"
    for option in ("skeleton", "category", "keep_empty_images") if is_mpii else ("ground_truth",):
        if getattr(arguments, option) not in (None, False):
            raise DataError(f"--{option.replace('_', '-')} does not go with --format {arguments.format}; leave it out")
    if is_mpii:
        shards = prepare_mpii(**_chosen(arguments, "images", "annotations", "output", "ground_truth"))
    else:
        options = _chosen(arguments, "images", "annotations", "output", "category", "keep_empty_images")
        shards = prepare_coco(**options, skeleton=load_skeleton(arguments.skeleton or "coco"))
    counts = shards.description["counts"]
    say(f"{shards.path}: {counts['images']} images, {counts['people']} annotations, {counts['usable']} usable")
    for key, count in shards.description["skipped"].items():
        say(f"  skipped {count} {(MPII_SKIPPED if is_mpii else COCO_SKIPPED)[key]}")
    for reason, count in shards.description["exclude_reason"].items():
        say(f"  kept for evaluation only: {count} ({reason.replace('_', ' ')})")
    if is_mpii and counts["head_sizes"] < counts["usable"]:
        say(f"  without the size of the head, so not in PCKh: {counts['usable'] - counts['head_sizes']}")
    if shards.skeleton.sigma_note:
        say(f"  {shards.skeleton.sigma_note.removeprefix(', ')}: the skeleton gives none")
    if counts["people"]:
        say(f"next: fpd-accel check {shards.path} --output PICTURE.png")
    else:
        say(f"next: fpd-accel detect {arguments.images} --annotations {arguments.annotations} --output BOXES.json")


def _publish(arguments: argparse.Namespace) -> None:
    from fpd_accel.data.published.publish import publish
    from fpd_accel.data.shards import Shards

    if arguments.group < 1 or arguments.file_size < 1:
        raise DataError("--group and --file-size: at least 1")
    shards, file_size = Shards(arguments.data), 10**6 * arguments.file_size
    layout = publish(shards, arguments.output, images_per_group=arguments.group, file_size=file_size)
    files = layout.images + layout.people
    groups = sum(len(file.groups) for file in layout.images)
    say(f"{arguments.output}: {sum(file.size for file in files) / 1e6:.1f} MB in {len(files)} files, "
        f"{layout.rows('images')} images in {groups} row groups, {layout.rows('people')} people")  # fmt: skip


def _detect(arguments: argparse.Namespace) -> None:
    from fpd_accel.detect import detect_people

    if not 0 <= arguments.threshold < 1:
        raise DataError(f"--threshold {arguments.threshold}: a score is from 0 up to 1")
    if arguments.batch < 1:
        raise DataError(f"--batch {arguments.batch}: at least 1 image")
    options = _chosen(arguments, "annotations", "weights", "threshold", "device", "batch")
    boxes = detect_people(arguments.images, arguments.output, **options)
    images = len({box["image_id"] for box in boxes})
    say(f"{arguments.output}: {len(boxes)} people with scores from {arguments.threshold:g} on, in {images} images")


def _check(arguments: argparse.Namespace) -> None:
    from fpd_accel.check.contact_sheet import choose_people, contact_sheet
    from fpd_accel.check.labels import read_labels
    from fpd_accel.check.report import check_shards, show_report, write_json
    from fpd_accel.data.shards import Shards
    from fpd_accel.visualize import save_picture

    if arguments.output is not None and arguments.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise DataError(f"{arguments.output}: a contact sheet is a .png or .jpg file")
    shards = Shards(arguments.data)
    labels = read_labels(shards)
    report = check_shards(shards, labels=labels)
    show_report(report)
    if arguments.json is not None:
        write_json(report, arguments.json)
    if arguments.output is not None:
        save_picture(arguments.output, contact_sheet(shards, labels, choose_people(labels, report.findings)))
        say(f"{arguments.output}: people as they are labelled")
    report.raise_errors()


def _import_config(arguments: argparse.Namespace) -> None:
    from fpd_accel.import_config.convert import import_config
    from fpd_accel.import_config.text import write_recipe

    recipe, text = import_config(arguments.cfg, arguments.overrides, teacher=arguments.tcfg)
    if arguments.output is None:
        sys.stdout.write(text)
        return
    write_recipe(text, arguments.output, force=arguments.force)
    say(f"{arguments.output}: {recipe.run.name}; its comments say what differs, and how to prepare the data")


def _predict(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fpd_accel.files import write_whole
    from fpd_accel.predict import Predictor, overlay_paths, read_boxes, read_image
    from fpd_accel.visualize import save_picture

    boxes = read_boxes(arguments.boxes) if arguments.boxes is not None else None
    overlays = overlay_paths(arguments.images, arguments.output)
    predictor = Predictor(arguments.model, device=arguments.device)
    people = []
    for path, overlay in overlays.items():
        image = read_image(path)
        height, width = map(float, image.shape[:2])
        own = [[0.0, 0.0, width, height]] if boxes is None else boxes.get(path.name, [])
        poses = predictor(image, np.asarray(own, dtype=np.float64).reshape(-1, 4))
        save_picture(overlay, predictor.draw(image, poses))
        for box, keypoints, scores in zip(own, poses.keypoints, poses.scores, strict=True):
            triples = np.concatenate([keypoints, scores[:, None]], axis=1)
            people.append({"file_name": path.name, "bbox": list(box), "keypoints": triples.round(3).ravel().tolist()})
    write_whole(arguments.output / "keypoints.json", json.dumps(people))
    say(f"{arguments.output}: {len(people)} people in {len(arguments.images)} images")


def _import_weights(arguments: argparse.Namespace) -> None:
    from fpd_accel.weights.import_weights import import_weights
    from fpd_accel.weights.model_cost import describe_model

    if arguments.verify is not None:
        replacement = "the project's tests compare with reference numbers: pytest -m parity"
        raise WeightsError(f"--verify: removed in 0.2; {replacement}")
    options = _chosen(arguments, "arch", "skeleton", "color", "codec", "sigma", "mean", "std")
    input_size = tuple(arguments.input_size) if arguments.input_size else None
    imported = import_weights(arguments.source, arguments.output, input_size=input_size, **options)
    config, reasons, pixels = imported.config, imported.reasons, imported.config.normalization
    mean, std = (" ".join(f"{number:g}" for number in side) for side in (pixels.mean, pixels.std))
    say(describe_model(str(arguments.output), config))
    say(f"  {config.input_size[0]} x {config.input_size[1]} (height x width), skeleton {config.skeleton.name}")
    say(f"  {pixels.color} ({reasons['color']}), mean {mean}, std {std} ({reasons['normalization']})")
    say(f"  codec {config.codec.name} ({reasons['codec']}), sigma {config.codec.sigma:g}")


def _info(arguments: argparse.Namespace) -> None:
    from fpd_accel.weights.tables import show_model

    show_model(arguments.folder)


COMMANDS = (
    ("synth", _add_synth, _synth, "draw synthetic people as a COCO keypoint dataset"),
    ("prepare", _add_prepare, _prepare, "turn COCO or MPII annotations and their images into shards"),
    ("check", _add_check, _check, "report on the quality of prepared data before training on them"),
    ("publish", _add_publish, _publish, "write shards as Parquet to the Hub, a bucket or a folder"),
    ("detect", _add_detect, _detect, "find the boxes of people in a folder of images"),
    ("predict", _add_predict, _predict, "find the keypoints of people in images"),
    ("info", _add_info, _info, "show what a model folder holds and what it costs"),
    ("import-weights", _add_import_weights, _import_weights, "turn a published checkpoint into a model folder"),
    ("import-config", _add_import_config, _import_config, "turn experiment files of the original code into a recipe"),
)
"""Name of each command, the functions that add its arguments and run it, and its help."""


if __name__ == "__main__":
    sys.exit(main())
