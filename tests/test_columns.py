"""Columns read at once are what the dataset gives row by row."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset

from fpd_accel.data.arrow_columns import read_columns
from fpd_accel.data.shards import Shards

COLUMNS = ("id", "image_id", "box", "keypoints", "area", "crowd")


@pytest.mark.parametrize("rows", [None, [0], [3, 1, 1, 7, 0], []])
def test_columns_are_those_of_the_dataset_whatever_the_rows(rows: list[int] | None, tiny_shards: Path) -> None:
    shards = Shards(tiny_shards)
    expected = shards.people[:] if rows is None else shards.people[rows or [0]]
    found = shards.columns(COLUMNS, None if rows is None else np.array(rows, dtype=np.int64))
    for name in COLUMNS:
        values = expected[name] if rows != [] else expected[name][:0]
        np.testing.assert_array_equal(found[name], values, strict=True)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 3), pa.list_(pa.float32())])
def test_rows_of_many_pieces_come_in_the_order_asked_for(kind: pa.DataType) -> None:
    random = np.random.default_rng(0)
    points = random.random((50, 3)).astype(np.float32)
    pieces = np.split(np.arange(50), [1, 2, 20, 20, 41])  # one of them empty
    tables = [pa.table({"row": piece, "points": pa.array(points[piece].tolist(), kind)}) for piece in pieces]
    dataset = Dataset(pa.concat_tables(tables))
    rows = random.integers(0, 50, 200)
    found = read_columns(dataset, ("row", "points"), rows)
    np.testing.assert_array_equal(found["row"], rows)
    np.testing.assert_array_equal(found["points"], points[rows], strict=True)
    np.testing.assert_array_equal(read_columns(dataset, ("points",))["points"], points, strict=True)
