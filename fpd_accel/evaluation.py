"""A network and a set of people -> metrics. The protocol of the published implementation, on any number of ranks.

Crop each person's box, annotated or a detector's, average the heatmaps with those of the mirrored crop (moved right by
one cell), take the maximum and a quarter step towards its higher neighbour, map it back to the image, score a person by
box score times mean score of confident keypoints, drop near-duplicates of an image by OKS, and let pycocotools compute
AP and AR.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fpd_accel.codecs import HeatmapCodec, PoseCodec
from fpd_accel.config import Evaluate
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.detections import SKIPPED, Detections
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.decode import accuracy, decode, fuse, fuse_scales
from fpd_accel.errors import ConfigError
from fpd_accel.log import say, track, warn
from fpd_accel.losses import Losses
from fpd_accel.metrics import average_precision
from fpd_accel.outputs import STRIDE, Output, SimCC, mean_output
from fpd_accel.scoring import Predictions, crowding, ground_truth, head_accuracy, keypoint_accuracy, results
from fpd_accel.watchdog import Watchdog

if TYPE_CHECKING:
    from accelerate import Accelerator

Compare = Callable[[tuple[Output, ...], Batch], Losses]


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
    watchdog: Watchdog | None = None,
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
        watchdog: is told of every batch, and waits while the first rank computes AP.

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
        watchdog=watchdog,
    )
    metrics: dict[str, float] = {}
    people: list[dict[str, Any]] = []
    with watchdog.paused("evaluated") if watchdog is not None else nullcontext():
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


def open_detections(shards: Shards, file: str, *, threshold: float) -> Detections:
    """The shards around a detector's boxes; says what was taken of the file and what was not.

    Raises:
        DataError: the boxes cannot be used.
    """
    detections = Detections(shards, file, threshold=threshold)
    say(
        f"{file}: {len(detections)} boxes with scores from {threshold:g} on, in "
        f"{detections.num_images} of the {len(detections.images)} images of {shards.path}"
    )
    for reason, count in detections.skipped.items():
        say(f"  skipped {count} {SKIPPED[reason]}")
    return detections


def with_boxes(shards: Shards, options: Evaluate) -> Shards:
    """The shards with the boxes of ``options.boxes`` in place of the annotated ones, if it names a file.

    Says what was taken and what was not; shards that have a detector's boxes already are returned as they are.

    Raises:
        DataError: the boxes cannot be used.
    """
    if options.boxes is None or isinstance(shards, Detections):
        return shards
    detections = open_detections(shards, options.boxes, threshold=options.box_threshold)
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
    watchdog: Watchdog | None = None,
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
    flip_index = torch.tensor(shards.skeleton.flip_index, device=device)  # once: copying waits for the device
    model.eval()
    for batches in track(zip(*loaders, strict=True), "evaluating", total=len(streams[0])):
        outputs = []
        if watchdog is not None:
            watchdog.alive("evaluating")
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
                output = fuse(output, mirrored, codec, flip_index, shift=options.flip_shift)
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
    means = []
    if losses:  # of the batches in order; those past the last person are there to give every rank as many
        values = _gather([torch.stack(losses)], accelerator).reshape(ranks, len(losses), -1)
        in_order = values.swapaxes(0, 1).reshape(ranks * len(losses), -1)
        means = in_order[: -(-len(shards) // options.batch)].mean(axis=0, dtype=np.float64).tolist()
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
