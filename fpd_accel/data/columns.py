"""Rows of memory-mapped Arrow columns as arrays, without the lists of Python objects and the copies in between.

Picked through ``datasets``, the rows of a batch of 32 cost as much as decoding four of its images.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


class Column:
    """A column of numbers, or of as many numbers in each row."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = _starts(chunks)
        self._rows = [_numbers(chunk).reshape(len(chunk), *_shape(chunk.type)) for chunk in chunks]

    def __getitem__(self, rows: Sequence[int]) -> np.ndarray:
        """Some rows, stacked, in the order asked for."""
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        return np.stack([self._rows[chunk][row - self._starts[chunk]] for chunk, row in zip(chunks, rows, strict=True)])


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


def _shape(kind: pa.DataType) -> tuple[int, ...]:
    return (kind.list_size,) if pa.types.is_fixed_size_list(kind) else ()


def _numbers(chunk: pa.Array) -> np.ndarray:
    flat = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
    return flat.to_numpy(zero_copy_only=False)  # a copy only where there are nulls, which we do not write
