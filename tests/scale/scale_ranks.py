"""Distil a tiny network as one of several processes; `scale.py` starts it once per rank.

It reads the environment variables that torchrun sets. Rank 0 prints one JSON object. Every process has one thread, so
that two of them have twice the resources of one.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence

import torch

from fpd_accel.bench.variants import draw_batch
from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Optim, Train
from fpd_accel.distributed.accelerator import create_accelerator, shutdown
from fpd_accel.models.create import create_model
from fpd_accel.outputs import STRIDE
from fpd_accel.skeleton import COCO
from fpd_accel.training.distiller import Distiller
from fpd_accel.training.student import Student
from fpd_accel.training.teacher import Teacher

WARM_UP = 2  # untimed steps, in which memory is allocated and gradient buckets are made


def train(*, steps: int, batch: int, input_size: tuple[int, int], student: str, teacher: str) -> float:
    """Return samples per second of all ranks together, each with `batch` of them in a step."""
    accelerator = create_accelerator("fp32", parallel="ddp")
    torch.set_num_threads(1)
    codec = HeatmapCodec(input_size, (input_size[0] // STRIDE, input_size[1] // STRIDE))
    joints = COCO.num_keypoints
    global_batch = batch * accelerator.num_processes
    trained = Student(
        create_model(student, joints),
        accelerator,
        train=Train(steps=steps, global_batch=global_batch),
        optim=Optim(schedule="constant"),
    )
    distiller = Distiller(trained.model, Teacher(create_model(teacher, joints)), codec)
    samples = draw_batch(batch, joints, input_size, hidden=0, seed=accelerator.process_index)
    trained.train()
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            accelerator.wait_for_everyone()
            began = time.perf_counter()
        losses = distiller(samples)
        accelerator.backward(losses.total)
        trained.step(1e-3)
    accelerator.wait_for_everyone()
    return steps * global_batch / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the rate on rank 0, and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--input-size", type=int, nargs=2, required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    chosen = parser.parse_args(arguments)
    height, width = chosen.input_size
    rate = train(
        steps=chosen.steps,
        batch=chosen.batch,
        input_size=(height, width),
        student=chosen.student,
        teacher=chosen.teacher,
    )
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"samples_per_second": rate}))
    shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
