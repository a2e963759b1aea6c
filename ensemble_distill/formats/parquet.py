"""Parquet shards: one non-null FixedSizeBinary column a field, one row group, one page, no compression.

Then a column's values stand in one run whose start follows from the footer, and can be read by offset.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ensemble_distill.formats.layout import Parts, Segment, merged


def encode(records: np.ndarray) -> tuple[Parts, tuple[Segment, ...]]:
    """The parts of a Parquet file with a column for each field of ``records``, and its segments."""
    names = records.dtype.names
    assert names
    rows = len(records)
    columns = {name: np.ascontiguousarray(records[name]) for name in names}
    strides = {name: column.nbytes // rows for name, column in columns.items()}
    schema = pa.schema(
        [pa.field(name, pa.binary(strides[name]), nullable=False, metadata=_describe(columns[name])) for name in names]
    )
    arrays = [
        pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(strides[name]), rows, [None, pa.py_buffer(columns[name].reshape(-1).view(np.uint8))]
        )
        for name in names
    ]
    sink = _Sink()
    described: list[Any] = []
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=schema),
        pa.PythonFile(sink, mode="w"),
        row_group_size=rows,
        data_page_size=1 << 30,
        max_rows_per_page=rows,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
        store_schema=False,
        metadata_collector=described,
    )
    group = described[0].row_group(0)
    segments = []
    for i, name in enumerate(names):
        chunk, size = group.column(i), columns[name].nbytes
        end = chunk.data_page_offset + chunk.total_compressed_size
        assert sink.starts.get(end - size) == size  # the values are the last thing in the only page
        segments.append(Segment(fields=(name,), offset=end - size, stride=strides[name]))
    return merged(sink.parts), tuple(segments)


class _Sink(io.RawIOBase):
    """Keeps what the library writes as it comes: a page's values in one piece. ``starts``: offset and size of each."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.starts: dict[int, int] = {}
        self._end = 0

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        self.starts[self._end] = len(data)
        self._end += len(data)
        return len(data)

    def tell(self) -> int:
        return self._end

    def writable(self) -> bool:
        return True


def check(data: bytes, dtype: np.dtype, rows: int, segments: Sequence[Segment]) -> str:
    """What is wrong with a shard as a Parquet file, or "": run it where a crash does no harm.

    There may be one row group of uncompressed fixed-size columns, whose values are those at the committed offsets.
    """
    names = dtype.names
    assert names
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, memory_map=False)
    held = file.metadata
    if (held.num_rows, held.num_row_groups, held.num_columns) != (rows, 1, len(names)):
        return f"it holds {held.num_rows} rows, {held.num_row_groups} groups and {held.num_columns} columns"
    group = held.row_group(0)
    for i, (name, segment) in enumerate(zip(names, segments, strict=True)):
        column, size = group.column(i), segment.stride * rows
        described = held.schema.column(i)
        if (column.path_in_schema, described.physical_type, described.length) != (
            name, "FIXED_LEN_BYTE_ARRAY", segment.stride,
        ):  # fmt: skip
            return f"column {i} is {column.path_in_schema}, {described.physical_type} of {described.length} bytes"
        if column.compression != "UNCOMPRESSED" or not size <= column.total_uncompressed_size <= size + (1 << 12):
            return f"column {name} is compressed, or not of the size of its rows"
        values = file.read_row_group(0, [name], use_threads=False).column(0)
        if values.null_count or b"".join(values.to_pylist()) != data[segment.offset : segment.offset + size]:
            return f"the values of {name} are not those at the committed offset"
    return ""


def _describe(column: np.ndarray) -> dict[str, str]:
    return {"dtype": column.dtype.str, "shape": json.dumps(column.shape[1:])}
