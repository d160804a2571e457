"""Evaluate a network on a set of people: the protocol of the published implementation, on any number of ranks.

Crop each person's box (annotated or detected), average the heatmaps with those of the mirrored crop (moved right by one
cell), take the maximum and move it a quarter cell towards its higher neighbour, map it back to the image, score each
person by box score times mean score of the confident keypoints, drop near-duplicates of an image by OKS, and compute AP
and AR with pycocotools.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fpd_accel.codecs import PoseCodec, create_codec
from fpd_accel.config.schema import Evaluate
from fpd_accel.console import track
from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.detections import Detections, with_boxes
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.decode import accuracy, decode, fuse, fuse_scales
from fpd_accel.distributed.watchdog import Watchdog
from fpd_accel.errors import ConfigError, ModelError
from fpd_accel.evaluation.coco_results import (
    Predictions,
    coco_results,
    detection_stats,
    ground_truth,
    head_accuracy,
    keypoint_accuracy,
)
from fpd_accel.losses import Losses
from fpd_accel.metrics import average_precision
from fpd_accel.models.names import DEFAULT_INPUT_SIZE
from fpd_accel.outputs import Output, SimCC, mean_output

if TYPE_CHECKING:
    from accelerate import Accelerator

Compare = Callable[[tuple[Output, ...], Batch], Losses]
Found = tuple[dict[str, float], list[dict[str, Any]]]  # metrics, and people in COCO's result format


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
) -> Found:
    """Return the metrics of a network on every usable person, and the people it found in COCO's result format.

    With a detector's boxes (`options.boxes`, or `Detections` as `shards`) AP and AR compare the people found in them
    with all annotated people. A box has no label of its own, so there are no losses and no PCK then.

    Args:
        model: Network from normalised images to a tuple of stage outputs; left in evaluation mode.
        shards: The people to evaluate on.
        codec: The codec that the network was trained with; it holds the size of a crop.
        input_size: (height, width) of a crop in pixels, in place of `codec` for plain heatmaps; None: (256, 192).
        normalization: How the network expects its pixels; None: ImageNet's mean and standard deviation.
        padding: Factor on each person's box.
        options: The evaluation protocol; None: the published one.
        compare: The objective; with it the mean losses and the training accuracy are among the metrics.
        workers: Loader processes per rank.
        accelerator: With several ranks each takes its share of the people, and all return the metrics.
        watchdog: Notified of every batch, and paused while rank 0 computes AP.

    Raises:
        DataError: The boxes cannot be used.
        ModelError: The network does not return a tuple of stage outputs.
    """
    options = options or Evaluate()
    codec = codec or create_codec("heatmap", input_size or DEFAULT_INPUT_SIZE)
    shards = with_boxes(shards, options)
    predictions, losses = predict(
        model,
        shards,
        codec=codec,
        normalization=normalization or Normalization(),
        padding=padding,
        options=options,
        compare=None if isinstance(shards, Detections) else compare,
        workers=workers,
        accelerator=accelerator,
        watchdog=watchdog,
    )
    found: Found = {}, []
    with watchdog.paused("evaluated") if watchdog is not None else nullcontext():
        if accelerator is None or accelerator.is_main_process:
            people = coco_results(shards, predictions, options=options, input_size=codec.input_size, padding=padding)
            found = _metrics(shards, predictions, people) | losses, people
        if accelerator is not None and accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            found = tuple(broadcast_object_list([*found]))
    return found


def _metrics(shards: Shards, predictions: Predictions, people: list[dict[str, Any]]) -> dict[str, float]:
    """Return AP and AR with their detection statistics, and for annotated boxes PCKh, and PCK in all and per joint."""
    metrics = average_precision(ground_truth(shards), people, shards.skeleton.sigmas)
    metrics |= detection_stats(shards, predictions, people)
    if isinstance(shards, Detections):
        return metrics
    return metrics | head_accuracy(shards, predictions) | keypoint_accuracy(shards, predictions)


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
    """Return the keypoints of every usable person, once each, from all ranks; with an objective its mean losses too.

    Arguments and errors are those of `evaluate`.
    """
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
    found, losses = [], []
    flip_index = torch.tensor(shards.skeleton.flip_index, device=device)  # once, because copying waits for the device
    model.eval()
    for batches in track(zip(*loaders, strict=True), "evaluating", total=len(streams[0])):
        if watchdog is not None:
            watchdog.alive("evaluating")
        outputs = []
        for scale, crops in zip(options.scales, batches, strict=True):
            batch = crops.to(device)
            images = normalization(batch.crops)
            stages = _forward(model, images)
            output = _select_stage(stages, options)
            if scale == 1.0:
                whole = batch
                if compare is not None:
                    terms = compare(stages, batch)
                    hits = accuracy(terms.predicted, terms.target)
                    losses.append(torch.stack([terms.total, terms.pose, terms.kd, hits]))
            if options.flip_test:
                mirrored = _select_stage(_forward(model, images.flip(-1)), options)
                output = fuse(output, mirrored, codec, flip_index, shift=options.flip_shift)
            outputs.append(output)
        fused = _fuse_scales(outputs, options, codec)
        found.append((whole.rows, *decode(fused, codec, whole.centers, whole.sizes, refine=options.refine)))
    rows, keypoints, scores = (_gather(parts, accelerator) for parts in zip(*found, strict=True))
    unique, first = np.unique(rows, return_index=True)  # the last batches repeat people to be full
    predictions = Predictions(unique, keypoints[first], scores[first])
    return predictions, _mean_losses(losses, accelerator, batches=-(-len(shards) // options.batch))


def _forward(model: nn.Module, images: Tensor) -> tuple[Output, ...]:
    """Return the outputs of all stages, after checking that they are a tuple."""
    stages = model(images)
    if isinstance(stages, SimCC) or not isinstance(stages, tuple | list) or not stages:
        raise ModelError(
            f"{type(model).__name__} returned {type(stages).__name__}, but a pose network returns a non-empty tuple "
            "with the output of each stage; return (heatmaps,) if there is one stage"
        )
    return tuple(stages)


def _select_stage(stages: tuple[Output, ...], options: Evaluate) -> Output:
    """Return the output to decode, float32: the last stage's, or the mean over stages."""
    return mean_output(stages if options.stages == "mean" else stages[-1:])


def _fuse_scales(outputs: list[Output], options: Evaluate, codec: PoseCodec) -> Output:
    """Return one output from those of regions of several scales."""
    if len(outputs) == 1:
        return outputs[0]
    maps = [output for output in outputs if not isinstance(output, SimCC)]
    if len(maps) < len(outputs):
        raise ConfigError("evaluate.scales: several scales are for heatmaps; SimCC takes [1.0], bins have no mean")
    return fuse_scales(maps, options.scales, unbiased=codec.unbiased)


def _mean_losses(losses: list[Tensor], accelerator: "Accelerator | None", *, batches: int) -> dict[str, float]:
    """Return the mean losses over the first `batches` batches of all ranks; empty without an objective.

    Later batches only give every rank the same number of batches.
    """
    if not losses:
        return {}
    ranks = accelerator.num_processes if accelerator else 1
    values = _gather([torch.stack(losses)], accelerator).reshape(ranks, len(losses), -1)
    in_order = values.swapaxes(0, 1).reshape(ranks * len(losses), -1)
    means = in_order[:batches].mean(axis=0, dtype=np.float64).tolist()
    return dict(zip(("loss", "pose_loss", "kd_pose_loss", "acc"), means, strict=True))


def _gather(parts: Iterable[Tensor], accelerator: "Accelerator | None") -> np.ndarray:
    joined = torch.cat(list(parts))
    return (accelerator.gather(joined) if accelerator else joined).cpu().numpy()
