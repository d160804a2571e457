"""From annotation files to batches: prepare, shards, streams, and people drawn from a seed."""

from fpd_accel.data.batch import Batch, Normalization
from fpd_accel.data.coco import prepare_coco
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.shards import Shards
from fpd_accel.data.stream import PoseStream, make_loader

__all__ = ["Batch", "Mixture", "Normalization", "PoseStream", "Shards", "make_loader", "prepare_coco"]
