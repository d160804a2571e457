"""Tables of model folders and converted weights."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from fpd_accel.codecs import SimCCCodec
from fpd_accel.console import stdout
from fpd_accel.outputs import BINS_PER_PIXEL
from fpd_accel.weights.convert import WRONG, Conversion, Entry
from fpd_accel.weights.model_cost import model_cost, original_gflops
from fpd_accel.weights.model_folder import ModelConfig, read_model_config

LISTED = 20  # tensors of each wrong kind that are listed by name


def _describe_codec(config: ModelConfig) -> str:
    codec = config.create_codec()
    if isinstance(codec, SimCCCodec):
        y_bins, x_bins = (BINS_PER_PIXEL * side for side in codec.input_size)
        return f"simcc: {x_bins} bins along x, {y_bins} along y"
    return f"{codec.kind}: {codec.heatmap_size[0]} x {codec.heatmap_size[1]} cells, sigma {codec.sigma:g}"


def show_model(folder: str | Path) -> None:
    """Print a table of a model folder: cost, input, output, skeleton, normalisation and origin of the weights.

    Raises:
        UserError: This is not a model folder, or its network cannot be built.
    """
    config = read_model_config(folder)
    parameters, macs = model_cost(config)
    height, width = config.input_size
    pixels, skeleton = config.normalization, config.skeleton
    table = Table(show_header=False)
    rows = {
        "network": config.arch + (f" with {_describe(config.arguments)}" if config.arguments else ""),
        "parameters": f"{parameters / 1e6:.3f} M",
        "multiply-adds": f"{macs / 1e9:.3f} G (10^9) per person: convolutions, linear layers, attention",
        "FLOPs": f"{2 * macs / 1e9:.3f} G: two per multiply-add",
        "original's GFLOPs": f"{original_gflops(config):.2f}: as the published tables count, in units of 2^30",
        "input": f"{height} x {width} (height x width), person box x {config.box_padding}",
        "output": _describe_codec(config),
        "skeleton": f"{skeleton.name}, {skeleton.num_keypoints} keypoints",
        "pixels": f"{pixels.color}, mean {_numbers(pixels.mean)}, std {_numbers(pixels.std)}",
        "source": "\n".join(f"{key}: {_describe(value)}" for key, value in config.source.items()) or "not recorded",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    _print(str(folder), table)


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def _describe(value: object) -> str:
    """Return a value of JSON in words: `key value` pairs without scores of single joints, numbers of four digits."""
    match value:
        case Mapping():
            shown = {key: inner for key, inner in value.items() if not str(key).startswith("joint/")}
            return ", ".join(f"{key} {_describe(inner)}" for key, inner in shown.items()) or "none"
        case list() | tuple():
            return " ".join(map(_describe, value)) or "none"
        case bool() | None:
            return {True: "yes", False: "no", None: "none"}[value]
        case float():
            return f"{value:.4g}"
        case _:
            return str(value)


def show_conversion(source: Path, conversion: Conversion) -> None:
    """Print a table of the tensors of a file: those that fit in groups, those that do not by name."""
    table = Table()
    table.add_column("tensors", justify="right")
    for heading in ("result", "in the file", "in the network"):
        table.add_column(heading, overflow="fold")
    rows = Counter(_row(entry) for entry in conversion.entries)
    listed: Counter[str] = Counter()
    for (kind, *cells), number in rows.items():
        listed[kind] += 1
        if kind not in WRONG or listed[kind] <= LISTED:
            table.add_row(str(number), *map(escape, cells))
    for kind in WRONG:
        if listed[kind] > LISTED:
            table.add_row(str(listed[kind] - LISTED), f"{kind}: further ones", "...", "...")
    _print(f"{source.name}: {conversion.arch}, {conversion.layout} layout", table)


def _row(entry: Entry) -> tuple[str, str, str, str]:
    """Return (kind, result, name in the file, name here), which is the same for tensors that share a row."""
    result = f"{entry.kind}: {entry.note}" if entry.note else entry.kind
    in_file = here = ""
    match entry.kind:
        case "missing" | "other shape":
            here = entry.name
        case "left over":
            in_file = entry.name
        case "unread":
            in_file = f"{entry.name.split('.')[0]}.*"
        case "renamed":
            old, new = (re.sub(r"\b\d+\b", "N", name).split(".") for name in (entry.sources[0], entry.name))
            while old and new and old[-1] == new[-1]:  # an equal ending needs no row of its own
                old, new = old[:-1], new[:-1]
            in_file, here = ".".join([*old, "*"]), ".".join([*new, "*"])
    return entry.kind, result, in_file, here


def _print(title: str, table: Table) -> None:
    """Print a table under its title; rich would break a title of its own into lines as narrow as the table."""
    stdout.print(escape(title), soft_wrap=True)
    stdout.print(table)
