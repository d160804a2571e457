"""Rows of memory-mapped Arrow columns as NumPy arrays, without Python lists and copies in between.

Indexing a `datasets.Dataset` cuts out each row as a table and joins them again. At 0.1 ms per row, the rows of a batch
of 32 would cost as much as decoding four of its images, and reading a million people would take minutes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset


class Column:
    """A column of numbers or strings, or of lists of one length, which become a second axis."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [chunk for chunk in column.chunks if len(chunk)] or [column.slice(0, 0).combine_chunks()]
        self._starts = _starts(self._chunks)

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the given rows, stacked in that order; only the chunks that hold them are read."""
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            return _array(self._chunks[0])[:0]
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        present, first = np.unique(owners[order], return_index=True)
        gathered = [
            _array(self._chunks[chunk])[rows[positions] - self._starts[chunk]]
            for chunk, positions in zip(present.tolist(), np.split(order, first[1:]), strict=True)
        ]
        return np.concatenate(gathered)[np.argsort(order)]

    def all(self) -> np.ndarray:
        """Return every row."""
        return np.concatenate([_array(chunk) for chunk in self._chunks])


def read_columns(
    dataset: Dataset, names: Iterable[str], rows: Sequence[int] | np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return columns of a dataset by name: all rows, or the given rows in that order."""
    columns = {name: Column(dataset.data.column(name)) for name in names}
    return {name: column.all() if rows is None else column[rows] for name, column in columns.items()}


class BytesColumn:
    """A column of bytes; each row is returned as a uint8 view of the mapped file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = _starts(self._chunks)

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return np.frombuffer(self._chunks[chunk][row - int(self._starts[chunk])].as_buffer(), np.uint8)


def _starts(chunks: Sequence[pa.Array]) -> np.ndarray:
    """Return the first row of each chunk."""
    return np.cumsum([0, *map(len, chunks)])[:-1]


def _array(chunk: pa.Array) -> np.ndarray:
    """Return a chunk as an array: a view for numbers, a copy for booleans, which Arrow packs eight to a byte."""
    if pa.types.is_fixed_size_list(chunk.type):
        return chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), chunk.type.list_size)
    if pa.types.is_list(chunk.type):
        flat = chunk.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(chunk), len(flat) // max(1, len(chunk)))
    return chunk.to_numpy(zero_copy_only=False)
