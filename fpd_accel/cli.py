"""``fpd-accel <command>``: what happens before and after training. Training itself is ``recipes/distill.py``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fpd_accel.bench.commands import add_commands
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

    prepare = commands.add_parser("prepare", help="turn COCO or MPII annotations and their images into shards")
    prepare.add_argument("--images", type=Path, required=True, help="folder of the images")
    prepare.add_argument(
        "--annotations", type=Path, required=True, help="COCO keypoint JSON; MPII: HRNet's JSON, or MPII's own .mat"
    )
    prepare.add_argument("--output", type=Path, required=True, help="folder to write")
    prepare.add_argument(
        "--format", choices=("coco", "mpii"), default="coco", help="of the annotations (default: coco)"
    )
    prepare.add_argument(
        "--skeleton", help="coco (default), mpii, or a YAML file like recipes/skeletons/lsp.yaml; format coco"
    )
    prepare.add_argument("--category", help="name of the category, where several have keypoints; format coco")
    prepare.add_argument(
        "--ground-truth", type=Path, help="HRNet's gt_valid.mat with its valid.json: head sizes for PCKh; format mpii"
    )
    prepare.add_argument(
        "--keep-empty-images",
        action="store_true",
        help="keep images without an annotated person: what a detector finds there counts against it (COCO's protocol)",
    )
    prepare.set_defaults(run=_prepare)

    detect = commands.add_parser("detect", help="find the boxes of people in a folder of images")
    detect.add_argument("images", type=Path, help="folder of the images")
    detect.add_argument("--output", type=Path, required=True, help="JSON to write: COCO's result format")
    detect.add_argument(
        "--annotations", type=Path, help="COCO JSON with the ids of the images; default: the number in each file name"
    )
    detect.add_argument(
        "--weights",
        type=Path,
        help="of torchvision's fasterrcnn_resnet50_fpn_v2 (default: download the published ones)",
    )
    detect.add_argument("--threshold", type=float, default=0.05, help="lowest score of a box (default: 0.05)")
    detect.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    detect.add_argument(
        "--batch", type=int, default=1, help="images per forward (default: 1); padding moves boxes a little"
    )
    detect.set_defaults(run=_detect)

    check = commands.add_parser("check", help="look at prepared data before training on them")
    check.add_argument(
        "data", help="shards written by fpd-accel prepare, or folder or URL written by fpd-accel publish"
    )
    check.add_argument("--output", type=Path, metavar="PICTURE.png", help="contact sheet of labelled people to write")
    check.add_argument("--json", type=Path, metavar="FILE", help="the whole report to write, for programs")
    check.set_defaults(run=_check)

    publish = commands.add_parser("publish", help="write shards as Parquet, for the Hub or another place to train from")
    publish.add_argument("data", metavar="SHARDS", help="written by fpd-accel prepare")
    publish.add_argument("output", help="folder to make, or a URL: hf://datasets/USER/NAME, s3://BUCKET/NAME, ...")
    publish.add_argument(
        "--group", type=int, default=128, help="images of a row group, what a stream fetches at once (default: 128)"
    )
    publish.add_argument("--file-size", type=int, default=256, help="megabytes of a file, about (default: 256)")
    publish.set_defaults(run=_publish)

    predict = commands.add_parser("predict", help="find the keypoints of people in images")
    predict.add_argument("images", nargs="+", type=Path, help="image files")
    predict.add_argument("--model", required=True, help="model folder, such as runs/quickstart/best")
    predict.add_argument("--output", type=Path, required=True, help="folder for keypoints.json and overlays")
    predict.add_argument(
        "--boxes",
        type=Path,
        help="what `fpd-accel detect` wrote, or JSON: file name -> [[x, y, width, height], ...]; default: whole images",
    )
    predict.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    predict.set_defaults(run=_predict)

    convert = commands.add_parser("import-weights", help="turn a published checkpoint into a model folder")
    convert.add_argument("source", type=Path, help=".pth, .pt, .tar, .safetensors, or a folder with model.safetensors")
    convert.add_argument("--output", type=Path, required=True, help="model folder to make")
    convert.add_argument("--arch", help="the network; default: told by names and shapes of the tensors")
    convert.add_argument("--skeleton", default="coco", help="coco (default), mpii or a YAML file: keypoints")
    convert.add_argument(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels; default: what the weights or the file's name say, else 256 192 (Hourglass and MPII: 256 256)",
    )
    convert.add_argument(
        "--color",
        choices=("rgb", "bgr"),
        help="channel order that it was trained on (default: bgr for Hourglass and PoseResNet of the HRNet and FPD "
        "repositories, else rgb)",
    )
    convert.add_argument(
        "--verify", type=Path, metavar="DIR", help="folder of fixtures to compare a checkpoint of the original with"
    )
    convert.add_argument(
        "--codec",
        choices=("heatmap", "dark", "udp"),
        help="it was trained by (default: udp for ViTPose; udp or dark where the name of an MMPose file says so; else "
        "heatmap)",
    )
    convert.add_argument(
        "--sigma", type=float, help="of its heatmaps, in cells (default: 3 from a height of 384 on, else and ViTPose 2)"
    )
    for name, what in (("--mean", "subtracted from the channels"), ("--std", "what the channels are divided by")):
        convert.add_argument(
            name,
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{what}, 0..1; for bgr in the order B G R (default: a transformers folder's, else ImageNet's)",
        )
    convert.set_defaults(run=_import_weights)

    info = commands.add_parser("info", help="what a model folder holds and what it costs")
    info.add_argument("folder", type=Path, help="model folder, such as runs/quickstart/best")
    info.set_defaults(run=_info)

    config = commands.add_parser("import-config", help="turn experiment files of the original code into a recipe")
    config.add_argument("--cfg", type=Path, required=True, metavar="S.yaml", help="experiment file of the student")
    config.add_argument("--tcfg", type=Path, metavar="T.yaml", help="experiment file of the teacher")
    config.add_argument("--output", type=Path, metavar="RECIPE.yaml", help="recipe to write (default: print it)")
    config.add_argument("--force", action="store_true", help="replace the recipe where it exists")
    config.add_argument(
        "overrides", nargs="*", metavar="KEY VALUE", help="as the original takes them: TRAIN.LR 0.001 …"
    )
    config.set_defaults(run=_import_config)

    add_commands(commands.add_parser("bench", help="measure what the trainer costs on this machine"))

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
    from fpd_accel.data.mpii import SKIPPED as SKIPPED_OF_MPII
    from fpd_accel.data.mpii import prepare_mpii
    from fpd_accel.skeleton import load_skeleton

    is_mpii = arguments.format == "mpii"
    for option in ("skeleton", "category", "keep_empty_images") if is_mpii else ("ground_truth",):
        if getattr(arguments, option) not in (None, False):
            raise DataError(f"--{option.replace('_', '-')} does not go with --format {arguments.format}; leave it out")
    files = {name: getattr(arguments, name) for name in ("images", "annotations", "output")}
    if is_mpii:
        shards = prepare_mpii(**files, ground_truth=arguments.ground_truth)
    else:
        skeleton = load_skeleton(arguments.skeleton or "coco")
        shards = prepare_coco(
            **files, skeleton=skeleton, category=arguments.category, keep_empty_images=arguments.keep_empty_images
        )
    counts = shards.description["counts"]
    say(f"{shards.path}: {counts['images']} images, {counts['people']} annotations, {counts['usable']} usable")
    for key, count in shards.description["skipped"].items():
        say(f"  skipped {count} {(SKIPPED_OF_MPII if is_mpii else SKIPPED)[key]}")
    for reason, count in shards.description["unused"].items():
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
    from fpd_accel.data.parquet import publish
    from fpd_accel.data.shards import Shards

    if arguments.group < 1 or arguments.file_size < 1:
        raise DataError("--group and --file-size: at least 1")
    layout = publish(
        Shards(arguments.data),
        arguments.output,
        images_per_group=arguments.group,
        file_size=10**6 * arguments.file_size,
    )
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
    boxes = detect_people(
        arguments.images,
        arguments.output,
        annotations=arguments.annotations,
        weights=arguments.weights,
        threshold=arguments.threshold,
        device=arguments.device,
        batch=arguments.batch,
    )
    images = len({box["image_id"] for box in boxes})
    say(f"{arguments.output}: {len(boxes)} people with scores from {arguments.threshold:g} on, in {images} images")


def _check(arguments: argparse.Namespace) -> None:
    from fpd_accel.check import check_shards, choose_people, contact_sheet, read_labels, show_report, write_json
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
    from fpd_accel.yacs import import_config, write_recipe

    recipe, text = import_config(arguments.cfg, arguments.overrides, teacher=arguments.tcfg)
    if arguments.output is None:
        sys.stdout.write(text)
        return
    write_recipe(text, arguments.output, force=arguments.force)
    say(f"{arguments.output}: {recipe.run.name}; its comments say what differs, and how to prepare the data")


def _predict(arguments: argparse.Namespace) -> None:
    import numpy as np

    from fpd_accel.files import write_whole
    from fpd_accel.predict import Predictor, overlay_paths, read_image, whole_image
    from fpd_accel.visualize import save_picture

    boxes = _read_boxes(arguments.boxes) if arguments.boxes is not None else None
    overlays = overlay_paths(arguments.images, arguments.output)
    predictor = Predictor(arguments.model, device=arguments.device)
    people = []
    for path, overlay in overlays.items():
        image = read_image(path)
        own = [whole_image(image)] if boxes is None else boxes.get(path.name, [])
        poses = predictor(image, np.asarray(own, dtype=np.float64).reshape(-1, 4))
        save_picture(overlay, predictor.draw(image, poses))
        for box, keypoints, scores in zip(own, poses.keypoints, poses.scores, strict=True):
            triples = np.concatenate([keypoints, scores[:, None]], axis=1)
            people.append({"file_name": path.name, "bbox": list(box), "keypoints": triples.round(3).ravel().tolist()})
    write_whole(arguments.output / "keypoints.json", json.dumps(people))
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
        codec=arguments.codec,
        sigma=arguments.sigma,
        mean=arguments.mean,
        std=arguments.std,
        verify=arguments.verify,
    )
    config, reasons = imported.config, imported.reasons
    mean, std = (
        " ".join(f"{number:g}" for number in side) for side in (config.normalization.mean, config.normalization.std)
    )
    say(describe_model(str(arguments.output), config))
    say(f"  {config.input_size[0]} x {config.input_size[1]} (height x width), skeleton {config.skeleton.name}")
    say(f"  {config.normalization.color} ({reasons['color']}), mean {mean}, std {std} ({reasons['normalization']})")
    say(f"  codec {config.codec.name} ({reasons['codec']}), sigma {config.codec.sigma:g}")


def _info(arguments: argparse.Namespace) -> None:
    from fpd_accel.report import show_model

    show_model(arguments.folder)


def _read_boxes(path: Path) -> dict[str, list[list[float]]]:
    from fpd_accel.data.numbers import is_usable

    try:
        boxes = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if isinstance(boxes, list):
        return _detected_boxes(path)
    if not isinstance(boxes, dict) or any(
        not isinstance(box, list) or len(box) != 4 or not all(map(is_usable, box))
        for entry in boxes.values()
        for box in (entry if isinstance(entry, list) else [None])
    ):
        raise DataError(f"{path}: wanted a mapping from file name to a list of [x, y, width, height]")
    return boxes


def _detected_boxes(path: Path) -> dict[str, list[list[float]]]:
    """Boxes of people by file name, from COCO's result format with the names that `fpd-accel detect` adds to it."""
    from fpd_accel.data.detections import PERSON, read_detections

    boxes: dict[str, list[list[float]]] = {}
    for detection in read_detections(path):
        if "file_name" not in detection:
            raise DataError(
                f"{path}: its boxes have no file_name, so nothing says of which image they are; `fpd-accel detect` "
                "writes it beside image_id"
            )
        if detection["category_id"] == PERSON and min(detection["bbox"][2:]) > 0:
            boxes.setdefault(Path(detection["file_name"]).name, []).append(detection["bbox"])
    return boxes


if __name__ == "__main__":
    sys.exit(main())
