"""Which of our networks ``MODEL.NAME`` and ``MODEL.EXTRA`` of the original describe, if any."""

from difflib import get_close_matches
from typing import Any

from fpd_accel.config import ARCHITECTURES
from fpd_accel.yacs.settings import EXTRA, Experiment, show

HRNET_WIDTHS, RESNET_DEPTHS = (
    sorted(int(name.removeprefix(family)) for name in ARCHITECTURES if name.startswith(family))
    for family in ("hrnet_w", "pose_resnet_")
)
BRANCHES = {2: (2, 1), 3: (3, 4), 4: (4, 3)}  # of each HRNet stage: resolutions side by side, and modules in a row


def find_architecture(experiment: Experiment) -> str | None:
    """The name of the network in a recipe; None, and the reasons among the mistakes, where there is none."""
    family = experiment["MODEL.NAME"]
    if "MODEL.NAME" in experiment.wrong:
        return None
    match family:
        case "pose_hrnet":
            name = _hrnet(experiment)
        case "pose_resnet":
            name = _pose_resnet(experiment)
        case "hourglass":
            name = _hourglass(experiment)
        case _:
            near = get_close_matches(family.lower(), EXTRA, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            experiment.refuse("MODEL.NAME", f"{show(family)} is not supported; {meant}choices: {', '.join(EXTRA)}")
            return None
    read = {"MODEL.NAME2", *(f"MODEL.EXTRA.{key}" for key in EXTRA[family])}
    if read.isdisjoint(experiment.wrong):
        return name
    experiment.wrong.add("MODEL.NAME")  # that there is no such network is said already
    return None


def _hrnet(experiment: Experiment) -> str:
    channels = experiment.extra("STAGE2.NUM_CHANNELS")
    width = next((width for width in HRNET_WIDTHS if channels and width == channels[0]), None)
    if channels is not None and width is None:
        widths = ", ".join(map(str, HRNET_WIDTHS))
        _refuse(experiment, "STAGE2.NUM_CHANNELS", f"{show(channels)} is not supported; the first is one of {widths}")
    wanted: dict[str, Any] = {"FINAL_CONV_KERNEL": 1}
    for stage, (branches, modules) in BRANCHES.items():
        wanted |= {
            f"STAGE{stage}.NUM_MODULES": modules,
            f"STAGE{stage}.NUM_BRANCHES": branches,
            f"STAGE{stage}.NUM_BLOCKS": [4] * branches,
            f"STAGE{stage}.BLOCK": "BASIC",
            f"STAGE{stage}.FUSE_METHOD": "SUM",
        }
        if width is not None:
            wanted[f"STAGE{stage}.NUM_CHANNELS"] = [width * 2**branch for branch in range(branches)]
    if channels is None:
        wanted["STAGE2.NUM_CHANNELS"] = None
    _compare(experiment, wanted, f"the HRNet of width {width}" if width else "every HRNet")
    return f"hrnet_w{width}"


def _pose_resnet(experiment: Experiment) -> str:
    depth = experiment.extra("NUM_LAYERS")
    wanted: dict[str, Any] = {
        "FINAL_CONV_KERNEL": 1,
        "DECONV_WITH_BIAS": False,
        "NUM_DECONV_LAYERS": 3,
        "NUM_DECONV_FILTERS": [256] * 3,
        "NUM_DECONV_KERNELS": [4] * 3,
    }
    if depth is None:
        wanted["NUM_LAYERS"] = None
    elif depth not in RESNET_DEPTHS:
        depths = ", ".join(map(str, RESNET_DEPTHS))
        _refuse(experiment, "NUM_LAYERS", f"{depth} is not supported; choices: {depths}")
    _compare(experiment, wanted, "the published PoseResNets")
    return f"pose_resnet_{depth}"


def _hourglass(experiment: Experiment) -> str:
    stacks, features = experiment.extra("NUM_STACKS"), experiment.extra("NUM_FEATURES")
    if stacks is not None and stacks < 1:
        _refuse(experiment, "NUM_STACKS", f"{stacks} is not supported; at least 1")
    if features is not None and (features < 8 or features % 4):
        _refuse(experiment, "NUM_FEATURES", f"{features} is not supported; a multiple of 4, at least 8")
    if experiment["MODEL.NAME2"] != "hourglass":
        experiment.refuse(
            "MODEL.NAME2", f"{show(experiment['MODEL.NAME2'])} is not supported; the published networks are 'hourglass'"
        )
    wanted = {"NUM_STACKS": stacks, "NUM_FEATURES": features, "NUM_BLOCKS": 1}
    _compare(experiment, wanted, "the published Hourglass networks")
    return f"hourglass_{stacks}x{features}"


def _compare(experiment: Experiment, wanted: dict[str, Any], network: str) -> None:
    for name, value in wanted.items():
        given = experiment.extra(name)
        if given is None:
            _refuse(experiment, name, f"missing; MODEL.NAME {experiment['MODEL.NAME']} needs it")
        elif given != value:
            _refuse(experiment, name, f"{show(given)} is not supported; {network} has {show(value)}")


def _refuse(experiment: Experiment, name: str, problem: str) -> None:
    experiment.refuse(f"MODEL.EXTRA.{name}", problem)
