"""A network and a set of people -> metrics. The protocol of the published implementation, on any number of ranks.

Crop each person's box, average the heatmaps with those of the mirrored crop (moved right by one cell), take the maximum
and a quarter step towards its higher neighbour, map it back to the image, score a person by box score times mean score
of confident keypoints, drop near-duplicates of an image by OKS, and let pycocotools compute AP and AR.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fpd_accel.config import Evaluate
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.decode import decode_heatmaps, fuse_flip, heatmap_accuracy
from fpd_accel.geometry import box_to_region, clip_box
from fpd_accel.log import track
from fpd_accel.losses import Losses
from fpd_accel.metrics import average_precision, oks_nms, pck, rescore

if TYPE_CHECKING:
    from accelerate import Accelerator

CATEGORY = 1  # "person", as COCO numbers it
PCK_THRESHOLDS = {"torso": 0.2, "box": 0.1}  # share of the torso's length, or of the box's longer side

Compare = Callable[[tuple[Tensor, ...], Batch], Losses]


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
    input_size: tuple[int, int],
    normalization: Normalization | None = None,
    padding: float = 1.25,
    options: Evaluate | None = None,
    compare: Compare | None = None,
    workers: int = 0,
    accelerator: "Accelerator | None" = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of a network on every usable person of the shards, and the people it found in COCO's result format.

    Args:
        model: from normalised images to a tuple of heatmaps; left in evaluation mode.
        input_size: (height, width) of a crop.
        compare: the objective; with it, the mean losses and the training accuracy are among the metrics.
        accelerator: where there are several ranks, each takes its share of the people and all get the metrics.
    """
    options = options or Evaluate()
    predictions, losses = predict(
        model,
        shards,
        input_size=input_size,
        normalization=normalization or Normalization(),
        padding=padding,
        options=options,
        compare=compare,
        workers=workers,
        accelerator=accelerator,
    )
    metrics: dict[str, float] = {}
    people: list[dict[str, Any]] = []
    if accelerator is None or accelerator.is_main_process:
        people = results(shards, predictions, options=options, input_size=input_size, padding=padding)
        metrics = average_precision(ground_truth(shards), people, shards.skeleton.sigmas)
        metrics |= keypoint_accuracy(shards, predictions) | losses
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        metrics, people = broadcast_object_list([metrics, people])
    return metrics, people


@torch.no_grad()
def predict(
    model: nn.Module,
    shards: Shards,
    *,
    input_size: tuple[int, int],
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
    stream = PoseStream(
        shards, input_size=input_size, batch_size=options.batch, padding=padding, rank=rank, ranks=ranks
    )
    rows, keypoints, scores, losses = [], [], [], []
    model.eval()
    for batch in track(make_loader(stream, workers, device), "evaluating", total=len(stream)):
        batch = batch.to(device)
        images = normalization(batch.crops)
        stages = model(images)
        heatmaps = stages[-1].float()
        if compare is not None:
            terms = compare(stages, batch)
            accuracy = heatmap_accuracy(heatmaps, terms.target)
            losses.append(torch.stack([terms.total, terms.pose, terms.kd, accuracy]))
        if options.flip_test:
            mirrored = model(images.flip(-1))[-1].float()
            heatmaps = fuse_flip(heatmaps, mirrored, shards.skeleton.flip_index, shift=options.flip_shift)
        found, confidence = decode_heatmaps(heatmaps, batch.centers, batch.sizes, refine="quarter")
        rows.append(batch.rows)
        keypoints.append(found)
        scores.append(confidence)
    gathered = [_gather(parts, accelerator) for parts in (rows, keypoints, scores)]
    unique, first = np.unique(gathered[0], return_index=True)  # the last batches repeat people to be full
    predictions = Predictions(unique, gathered[1][first], gathered[2][first])
    means = _gather([torch.stack(losses)], accelerator).mean(axis=0).tolist() if losses else []
    return predictions, dict(zip(("loss", "pose_loss", "kd_pose_loss", "acc"), means, strict=False))


def _gather(parts: Iterable[Tensor], accelerator: "Accelerator | None") -> np.ndarray:
    joined = torch.cat(list(parts))
    return (accelerator.gather(joined) if accelerator else joined).cpu().numpy()


def results(
    shards: Shards, predictions: Predictions, *, options: Evaluate, input_size: tuple[int, int], padding: float = 1.25
) -> list[dict[str, Any]]:
    """People in COCO's result format, rescored, without near-duplicates (OKS-NMS per image)."""
    people = shards.people[predictions.rows]
    sizes = regions(shards, predictions.rows, input_size, padding)[1]
    areas = sizes.prod(axis=1)  # of the padded region, as the published code takes it
    scores = rescore(predictions.scores, people["score"], options.keypoint_threshold)
    found = []
    for image in np.unique(people["image_id"]):
        members = np.flatnonzero(people["image_id"] == image)
        kept = oks_nms(
            predictions.keypoints[members],
            scores[members],
            areas[members],
            options.nms_threshold,
            shards.skeleton.sigmas,
        )
        found += [_result(int(image), predictions, int(member), float(scores[member])) for member in members[kept]]
    return found


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
    clipped = np.stack([clip_box(box, width, height) for box, width, height in triples])
    return box_to_region(clipped, input_size, padding=padding)


def ground_truth(shards: Shards, *, rows: np.ndarray | None = None) -> dict[str, Any]:
    """Everything annotated in the shards as a COCO dataset: crowds and people without keypoints too.

    ``rows`` takes some people alone, and their images.
    """
    people = shards.people[:] if rows is None else shards.people[rows]
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
