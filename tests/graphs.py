"""Compare a compiled objective with the plain one: `python tests/graphs.py whole|units eager|inductor`.

`test_compilation.py` runs this in a process of its own, because code that checks its shapes cannot become a graph. It
prints one JSON object. The networks are small, because every kernel costs seconds of the C++ compiler.
"""

import copy
import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fpd_accel.codecs import HeatmapCodec
from fpd_accel.config.schema import Recipe
from fpd_accel.data.batch import Batch
from fpd_accel.models.base import PoseModel
from fpd_accel.models.compile import compile_network, eagerly
from fpd_accel.training.distiller import Distiller
from fpd_accel.training.teacher import Teacher

SIZE, JOINTS, PEOPLE = 32, 3, 4


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.change = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, feature: Tensor) -> Tensor:
        return torch.relu(feature + self.change(feature))


class SmallNetwork(PoseModel):
    """A strided convolution, two blocks of equal shape, and a head."""

    input_multiple: ClassVar[int] = 4
    units: ClassVar[tuple[str, ...]] = ("Block",)

    def __init__(self, channels: int) -> None:
        super().__init__(JOINTS)
        self.stem = nn.Conv2d(3, channels, 4, stride=4)
        self.blocks = nn.Sequential(Block(channels), Block(channels))
        self.head = nn.Conv2d(channels, JOINTS, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.head(self.blocks(self.stem(images))),)


def random_batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        crops=torch.randint(0, 256, (PEOPLE, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator),
        keypoints=SIZE * torch.rand(PEOPLE, JOINTS, 2, generator=generator),
        visible=(torch.rand(PEOPLE, JOINTS, generator=generator) > 0.3).float(),
        centers=torch.zeros(PEOPLE, 2),
        sizes=torch.ones(PEOPLE, 2),
        rows=torch.arange(PEOPLE),
    )


def count_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def create_objectives(choice: str) -> tuple[Distiller, Distiller]:
    """Return the same objective twice, the second compiled by `choice` of `train.compile`."""
    torch.manual_seed(0)
    student, teacher, codec = SmallNetwork(8), SmallNetwork(16), HeatmapCodec((SIZE, SIZE), (SIZE // 4, SIZE // 4))
    plain = Distiller(copy.deepcopy(student), Teacher(copy.deepcopy(teacher)), codec)
    compiled = Distiller(student, Teacher(teacher, compile=choice), codec)  # type: ignore[arg-type]
    if choice == "units":
        compile_network(student, "units")
    compiled.compile(student=choice == "whole")
    return plain, compiled


def gap(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the first."""
    return float((one - other).norm() / one.norm())


def compare(choice: str) -> dict[str, Any]:
    """Return the gaps between a compiled objective and the plain one, over three steps with a changing alpha."""
    plain, compiled = create_objectives(choice)
    found: dict[str, list[float]] = {"total": [], "gradient": [], "statistics": [], "teacher": [], "graphs": []}
    for step in range(3):
        both = []
        for distiller in (plain, compiled):
            distiller.alpha = 0.2 + 0.1 * step
            losses = distiller(random_batch(step))
            losses.total.backward()
            network = distiller.student
            gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
            statistics = torch.cat([b.flatten().float() for b in network.buffers()])
            both.append((losses.total.detach(), gradient.clone(), statistics.clone(), losses.teacher_output))
            network.zero_grad()
        for name, one, other in zip(found, *both, strict=False):
            found[name].append(gap(one, other))
        found["graphs"].append(count_graphs())
    recipe = Recipe.model_validate(
        {"run": {"name": "a"}, "data": {"train": "a"}, "student": {"arch": "tiny_w8"},
         "train": {"global_batch": 1, "compile": choice}}
    )  # fmt: skip
    with eagerly(recipe.train.compile != "none" or recipe.teacher.compile != "none"), torch.no_grad():
        compiled.student.eval()
        batch = random_batch(0)
        first = replace(batch, **{name: tensor[:1] for name, tensor in vars(batch).items() if tensor is not None})
        compiled.compare(compiled.student(torch.zeros(1, 3, SIZE, SIZE)), first)
    return found | {"graphs_after_evaluation": count_graphs(), "names": list(compiled.student.state_dict())}


def float8(choice: str) -> float:
    """Return the gap between a teacher in float8 on a GPU, compiled or not, and the one on a processor."""
    from test_fp8 import random_batch, relative, transformer

    model, batch = transformer(), random_batch()
    expected = Teacher(copy.deepcopy(model), precision=torch.bfloat16, fp8=True)(batch.crops)[0]
    teacher = Teacher(model, device="cuda", precision=torch.bfloat16, fp8=True, compile=choice)  # type: ignore[arg-type]
    assert isinstance(expected, Tensor)
    return relative(teacher(batch.to("cuda").crops)[0].cpu(), expected)  # type: ignore[union-attr]


if __name__ == "__main__":
    if sys.argv[1] == "float8":
        print(json.dumps(float8(sys.argv[2])))
    else:
        torch.compile = partial(torch.compile, backend=sys.argv[2])
        print(json.dumps(compare(sys.argv[1])))
