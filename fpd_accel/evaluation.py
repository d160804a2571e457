"""A network and a set of people -> metrics. The protocol of the published implementation, on any number of ranks.

Crop each person's box, annotated or a detector's, average the heatmaps with those of the mirrored crop (moved right by
one cell), take the maximum and a quarter step towards its higher neighbour, map it back to the image, score a person by
box score times mean score of confident keypoints, drop near-duplicates of an image by OKS, and let pycocotools compute
AP and AR.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec, PoseCodec
from fpd_accel.config import Evaluate
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.detections import SKIPPED, Detections
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.decode import accuracy, decode, fuse, fuse_scales
from fpd_accel.errors import ConfigError
from fpd_accel.geometry import box_to_region
from fpd_accel.log import say, track, warn
from fpd_accel.losses import Losses
from fpd_accel.metrics import average_precision, mpii_scores, oks_nms, pck, rescore, soft_oks_nms
from fpd_accel.outputs import STRIDE, Output, SimCC, mean_output

if TYPE_CHECKING:
    from accelerate import Accelerator

CATEGORY = 1  # "person", as COCO numbers it
PCK_THRESHOLDS = {"torso": 0.2, "box": 0.1}  # share of the torso's length, or of the box's longer side

Compare = Callable[[tuple[Output, ...], Batch], Losses]


@dataclass(frozen=True)
class Predictions:
    """Keypoints of N people in image pixels, as arrays that share their first axis."""

    rows: Int64[np.ndarray, " person"]  # of the people in the shards
    keypoints: Float[np.ndarray, "person joint 2"]
    scores: Float[np.ndarray, "person joint"]  # heatmap maxima


def evaluate(
    model: nn.Module,
    shards: Shards,
    *,
    codec: PoseCodec | None = None,
    input_size: tuple[int, int] | None = None,
    normalization: Normalization | None = None,
    padding: float = 1.25,
    options: Evaluate | None = None,
    compare: Compare | None = None,
    workers: int = 0,
    accelerator: "Accelerator | None" = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of a network on every usable person of the shards, and the people it found in COCO's result format.

    With a detector's boxes (``options.boxes``, or :class:`Detections` for shards) AP and AR count whatever was found
    around them against everybody annotated. Nobody says whom a box shows, so there are no losses and no PCK then.

    Args:
        model: from normalised images to a tuple of stage outputs; left in evaluation mode.
        codec: what the outputs mean, and the size of a crop.
        input_size: (height, width) of a crop, in place of ``codec`` where the outputs are plain heatmaps.
        compare: the objective; with it, the mean losses and the training accuracy are among the metrics.
        accelerator: where there are several ranks, each takes its share of the people and all get the metrics.

    Raises:
        DataError: the boxes cannot be used.
    """
    options = options or Evaluate()
    if codec is None:
        height, width = input_size or (256, 192)
        codec = HeatmapCodec((height, width), (height // STRIDE, width // STRIDE))
    shards = with_boxes(shards, options)
    labelled = not isinstance(shards, Detections)
    predictions, losses = predict(
        model,
        shards,
        codec=codec,
        normalization=normalization or Normalization(),
        padding=padding,
        options=options,
        compare=compare if labelled else None,
        workers=workers,
        accelerator=accelerator,
    )
    metrics: dict[str, float] = {}
    people: list[dict[str, Any]] = []
    if accelerator is None or accelerator.is_main_process:
        people = results(shards, predictions, options=options, input_size=codec.input_size, padding=padding)
        metrics = average_precision(ground_truth(shards), people, shards.skeleton.sigmas)
        metrics |= crowding(shards, predictions, people)
        if labelled:
            metrics |= head_accuracy(shards, predictions) | keypoint_accuracy(shards, predictions) | losses
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        metrics, people = broadcast_object_list([metrics, people])
    return metrics, people


def with_boxes(shards: Shards, options: Evaluate) -> Shards:
    """The shards with the boxes of ``options.boxes`` in place of the annotated ones, if it names a file.

    Says what was taken and what was not; shards that have a detector's boxes already are returned as they are.

    Raises:
        DataError: the boxes cannot be used.
    """
    if options.boxes is None or isinstance(shards, Detections):
        return shards
    detections = Detections(shards, options.boxes, threshold=options.box_threshold)
    say(
        f"{options.boxes}: {len(detections)} boxes with scores from {options.box_threshold:g} on, in "
        f"{detections.num_images} of the {len(detections.images)} images of {shards.path}"
    )
    for reason, count in detections.skipped.items():
        say(f"  skipped {count} {SKIPPED[reason]}")
    if unknown := detections.skipped.get("unknown_image"):
        dropped = shards.description["skipped"].get("image_empty", 0)
        warn(
            f"{unknown} boxes are of images that {shards.path} does not have"
            + (f" ({dropped} images without an annotated person were left out when it was prepared)" if dropped else "")
            + "; COCO's protocol counts what is found there as false alarms, so AP is optimistic: for the exact "
            "protocol prepare the images with --keep-empty-images"
        )
    return detections


@torch.no_grad()
def predict(
    model: nn.Module,
    shards: Shards,
    *,
    codec: PoseCodec,
    normalization: Normalization,
    padding: float,
    options: Evaluate,
    compare: Compare | None = None,
    workers: int = 0,
    accelerator: "Accelerator | None" = None,
) -> tuple[Predictions, dict[str, float]]:
    """Keypoints of every usable person, each once, gathered from all ranks; with an objective, the mean losses too."""
    device = next(model.parameters()).device
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    streams = [
        PoseStream(
            shards,
            input_size=codec.input_size,
            batch_size=options.batch,
            padding=padding * scale,
            rank=rank,
            ranks=ranks,
            unbiased=codec.unbiased,
        )
        for scale in options.scales
    ]
    loaders = [make_loader(stream, workers, device) for stream in streams]
    rows, keypoints, scores, losses = [], [], [], []
    model.eval()
    for batches in track(zip(*loaders, strict=True), "evaluating", total=len(streams[0])):
        outputs = []
        for scale, crops in zip(options.scales, batches, strict=True):
            batch = crops.to(device)
            images = normalization(batch.crops)
            stages = model(images)
            output = _chosen(stages, options)
            if scale == 1.0:
                whole = batch
            if compare is not None and scale == 1.0:
                terms = compare(stages, batch)
                hits = accuracy(terms.predicted, terms.target)
                losses.append(torch.stack([terms.total, terms.pose, terms.kd, hits]))
            if options.flip_test:
                mirrored = _chosen(model(images.flip(-1)), options)
                output = fuse(output, mirrored, codec, shards.skeleton.flip_index, shift=options.flip_shift)
            outputs.append(output)
        found, confidence = decode(
            _over_scales(outputs, options, codec), codec, whole.centers, whole.sizes, refine=options.refine
        )
        rows.append(whole.rows)
        keypoints.append(found)
        scores.append(confidence)
    gathered = [_gather(parts, accelerator) for parts in (rows, keypoints, scores)]
    unique, first = np.unique(gathered[0], return_index=True)  # the last batches repeat people to be full
    predictions = Predictions(unique, gathered[1][first], gathered[2][first])
    means = _gather([torch.stack(losses)], accelerator).mean(axis=0).tolist() if losses else []
    return predictions, dict(zip(("loss", "pose_loss", "kd_pose_loss", "acc"), means, strict=False))


def _chosen(stages: tuple[Output, ...], options: Evaluate) -> Output:
    """The output to decode, float32."""
    return mean_output(stages if options.stages == "mean" else stages[-1:])


def _over_scales(outputs: list[Output], options: Evaluate, codec: PoseCodec) -> Output:
    """One output of those of regions of several scales."""
    if len(outputs) == 1:
        return outputs[0]
    maps = [output for output in outputs if not isinstance(output, SimCC)]
    if len(maps) < len(outputs):
        raise ConfigError("evaluate.scales: heatmaps of several scales can be averaged, SimCC's bins not; use [1.0]")
    return fuse_scales(maps, options.scales, unbiased=codec.unbiased)


def _gather(parts: Iterable[Tensor], accelerator: "Accelerator | None") -> np.ndarray:
    joined = torch.cat(list(parts))
    return (accelerator.gather(joined) if accelerator else joined).cpu().numpy()


def results(
    shards: Shards, predictions: Predictions, *, options: Evaluate, input_size: tuple[int, int], padding: float = 1.25
) -> list[dict[str, Any]]:
    """People in COCO's result format, rescored, without near-duplicates (OKS-NMS per image), best of an image first.

    Soft suppression chooses whom to keep by decayed scores, but as in the published code the score of a person stays.
    """
    people = shards.people[predictions.rows]
    sizes = regions(shards, predictions.rows, input_size, padding)[1]
    areas = sizes.prod(axis=1)  # of the padded region, as the published code takes it
    scores = rescore(predictions.scores, people["score"], options.keypoint_threshold)
    found = []
    for image in np.unique(people["image_id"]):
        members = np.flatnonzero(people["image_id"] == image)
        own = (predictions.keypoints[members], scores[members], areas[members])
        match options.nms:
            case "hard":
                kept = oks_nms(*own, options.nms_threshold, shards.skeleton.sigmas)
            case "soft":
                kept = soft_oks_nms(*own, options.nms_threshold, shards.skeleton.sigmas)
            case "none":
                kept = np.argsort(-scores[members], kind="stable")
        found += [_result(int(image), predictions, int(member), float(scores[member])) for member in members[kept]]
    return found


def crowding(shards: Shards, predictions: Predictions, people: list[dict[str, Any]]) -> dict[str, float]:
    """What the scores of a protocol hang on: people per image with people, before and after NMS, and their scores."""
    images = len(np.unique(shards.people[predictions.rows]["image_id"]))
    scores = [person["score"] for person in people]
    return {
        "people_per_image_before_nms": len(predictions.rows) / images,
        "people_per_image": len(people) / images,
        "score_min": min(scores),
        "score_max": max(scores),
    }


def _result(image_id: int, predictions: Predictions, person: int, score: float) -> dict[str, Any]:
    triples = np.concatenate([predictions.keypoints[person], predictions.scores[person, :, None]], axis=1)
    return {
        "image_id": image_id,
        "category_id": CATEGORY,
        "keypoints": [round(float(value), 3) for value in triples.ravel()],
        "score": score,
    }


def regions(
    shards: Shards, rows: np.ndarray, input_size: tuple[int, int], padding: float
) -> tuple[np.ndarray, np.ndarray]:
    """Centres and (width, height) of the crops of some people, image pixels."""
    people = shards.people[rows]
    pictures = shards.images.select_columns(["width", "height"])[people["image_row"].tolist()]
    triples = zip(people["box"], pictures["width"], pictures["height"], strict=True)
    boxes = np.stack([shards.box_to_crop(box, width=width, height=height) for box, width, height in triples])
    return box_to_region(boxes, input_size, padding=padding)


def ground_truth(shards: Shards, *, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Everything annotated in the shards as a COCO dataset: crowds and people without keypoints too.

    ``rows`` takes some people alone, and their images.
    """
    annotated = shards.annotated.people
    people = annotated[:] if rows is None else annotated[rows]
    annotations = [
        {
            "id": int(people["id"][i]),
            "image_id": int(people["image_id"][i]),
            "category_id": CATEGORY,
            "bbox": people["box"][i].tolist(),
            "area": float(people["area"][i]),
            "iscrowd": int(people["crowd"][i]),
            "keypoints": people["keypoints"][i].tolist(),
            "num_keypoints": int((people["keypoints"][i][2::3] > 0).sum()),
        }
        for i in range(len(people["id"]))
    ]
    listed = shards.images.with_format("numpy")["id"][:] if rows is None else np.unique(people["image_id"])
    images = [{"id": int(image)} for image in listed]
    return {"images": images, "annotations": annotations, "categories": [{"id": CATEGORY, "name": "person"}]}


def ground_truth_predictions(shards: Shards, *, rows: np.ndarray | None = None) -> Predictions:
    """The labels as predictions, for testing the path behind the network: it has to score 1.0.

    A network says something about every keypoint, so unlabelled ones lie in the middle of the box. ``rows`` takes some
    usable people alone.
    """
    rows = shards.usable if rows is None else rows
    people = shards.people[rows]
    triples = people["keypoints"].reshape(len(rows), -1, 3)
    middle = (people["box"][:, :2] + people["box"][:, 2:] / 2)[:, None]
    labelled = triples[..., 2] > 0
    keypoints = np.where(labelled[..., None], triples[..., :2], middle)
    return Predictions(rows, keypoints, labelled.astype(np.float32))


def keypoint_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """PCK in percent: the share of labelled keypoints found within 0.2 torso lengths (or 0.1 of the box's longer side).

    The torso's ends are the skeleton's (Sapp & Taskar, CVPR 2013, for 0.2); people without both of them do not count.
    """
    people = shards.people[predictions.rows]
    triples = people["keypoints"].reshape(len(predictions.rows), -1, 3)
    truth, visible = triples[..., :2], triples[..., 2] > 0
    if shards.skeleton.torso is not None:
        kind, (a, b) = "torso", (shards.skeleton.index(name) for name in shards.skeleton.torso)
        lengths = np.linalg.norm(truth[:, a] - truth[:, b], axis=-1)
        lengths = np.where(visible[:, a] & visible[:, b], lengths, np.nan)
    else:
        kind, lengths = "box", people["box"][:, 2:].max(axis=1)
    threshold = PCK_THRESHOLDS[kind]
    return {f"PCK_{kind}@{threshold}": pck(predictions.keypoints, truth, lengths, visible, threshold).mean}


def head_accuracy(shards: Shards, predictions: Predictions) -> dict[str, float]:
    """:func:`~fpd_accel.metrics.mpii_scores` of the people whose head size the shards know, if there are any."""
    if not shards.has_head_sizes:
        return {}
    people = shards.people[predictions.rows]
    triples = people["keypoints"].reshape(len(predictions.rows), -1, 3)
    return mpii_scores(predictions.keypoints, triples[..., :2], people["head_size"], triples[..., 2] > 0)


def selection_metric(shards: Shards) -> str:
    """The metric by which the best of several networks is chosen on these people."""
    return "PCKh@0.5" if shards.has_head_sizes and not isinstance(shards, Detections) else "AP"
