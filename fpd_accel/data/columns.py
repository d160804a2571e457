"""Rows of memory-mapped Arrow columns as arrays, without the lists of Python objects and the copies in between.

Indexing a dataset itself cuts each row out as a table of its own and joins them again: a tenth of a millisecond each,
so that the rows of a batch of 32 cost as much as decoding four of its images, and those of a million people minutes.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset


class Column:
    """A column of numbers or words, or of lists that are equally long in each row: a second axis."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = _starts(self._chunks)
        self._nothing = _array(column.slice(0, 0).combine_chunks())

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some rows, stacked, in the order asked for; only the chunks that have any are read."""
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            return self._nothing
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        present, first = np.unique(owners[order], return_index=True)
        gathered: np.ndarray | None = None
        for number, places in zip(present.tolist(), np.split(order, first[1:]), strict=True):
            found = _array(self._chunks[number])[rows[places] - self._starts[number]]
            if gathered is None:
                gathered = np.empty((len(rows), *found.shape[1:]), dtype=found.dtype)
            gathered[places] = found
        assert gathered is not None
        return gathered

    def all(self) -> np.ndarray:
        """Every row."""
        return np.concatenate([_array(chunk) for chunk in self._chunks]) if self._chunks else self._nothing


def read_columns(
    dataset: Dataset, names: Iterable[str], rows: Sequence[int] | np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The values of some columns of a dataset; all rows, or some in the order asked for."""
    columns = {name: Column(dataset.data.column(name)) for name in names}
    return {name: column.all() if rows is None else column[rows] for name, column in columns.items()}


class BytesColumn:
    """A column of bytes, each row as an array that lies in the file."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = _starts(chunks)
        offset = np.int64 if column.type == pa.large_binary() else np.int32
        self._ends = [np.frombuffer(chunk.buffers()[1], offset)[chunk.offset :] for chunk in chunks]
        self._bytes = [np.frombuffer(chunk.buffers()[2] or b"", np.uint8) for chunk in chunks]

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        first, end = self._ends[chunk][row - self._starts[chunk] :][:2]
        return self._bytes[chunk][first:end]


def _starts(chunks: Sequence[pa.Array]) -> np.ndarray:
    """The first row of each chunk."""
    return np.cumsum([0, *map(len, chunks)])[:-1]


def _array(chunk: pa.Array) -> np.ndarray:
    """A view of a chunk where there is one: of numbers, not of truth values, of which Arrow has eight in a byte."""
    if pa.types.is_list(chunk.type) or pa.types.is_fixed_size_list(chunk.type):
        width = chunk.type.list_size if pa.types.is_fixed_size_list(chunk.type) else -1
        flat = chunk.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(chunk), width) if len(chunk) else flat.reshape(0, max(width, 0))
    return chunk.to_numpy(zero_copy_only=False)
