"""Parquet shards: one non-null FixedSizeBinary column a field, one row group, one page, no compression.

Then a column's values stand in one run whose start follows from the footer, and can be read by offset. The tokens of
a ragged feature are one more column, of lists: their values are the end of its page.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ensemble_distill.formats.layout import Parts, Segment, merged, read_segments


def encode(records: np.ndarray, tokens: np.ndarray | None = None) -> tuple[Parts, tuple[Segment, ...]]:
    """The parts of a Parquet file with a column for each field of ``records``, and its segments.

    With ``tokens`` (structured [n]; the rows' field ``…/start`` says where each row's begin) there is a last column, of
    lists of them.
    """
    names = records.dtype.names
    assert names
    rows = len(records)
    columns = {name: np.ascontiguousarray(records[name]) for name in names}
    strides = {name: column.nbytes // rows for name, column in columns.items()}
    fields = [
        pa.field(name, pa.binary(strides[name]), nullable=False, metadata=_describe(columns[name])) for name in names
    ]
    arrays: list[pa.Array] = [_binary(columns[name], strides[name]) for name in names]
    if tokens is not None:
        field, array = _lists(records, tokens)
        fields.append(field)
        arrays.append(array)
    sink = _Sink()
    described: list[Any] = []
    pq.write_table(
        pa.Table.from_arrays(arrays, schema=pa.schema(fields)),
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
    if tokens is not None:
        chunk = group.column(len(names))
        end = chunk.data_page_offset + chunk.total_compressed_size
        segments.append(_of_tokens(tokens, end - tokens.nbytes))
        assert sink.ends_with(end, tokens)  # behind the lengths of the lists, in the only page
    return merged(sink.parts), tuple(segments)


def _binary(values: np.ndarray, stride: int) -> pa.Array:
    count = len(values)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(stride), count, [None, pa.py_buffer(values.reshape(-1).view(np.uint8))]
    )


def _lists(records: np.ndarray, tokens: np.ndarray) -> tuple[pa.Field, pa.Array]:
    """The column of a ragged feature: of each row, a list of its tokens."""
    (name,), stride = tokens.dtype.names or ("",), tokens.dtype.itemsize
    kind = pa.list_(pa.field("element", pa.binary(stride), nullable=False))
    bounds = np.append(_starts(records), len(tokens)).astype(np.int32)
    array = pa.ListArray.from_arrays(pa.array(bounds), _binary(tokens, stride), type=kind)
    return pa.field(name, kind, nullable=False, metadata=_describe(tokens[name])), array


def _starts(records: np.ndarray) -> np.ndarray:
    (name,) = (name for name in records.dtype.names or () if name.endswith("/start"))
    starts: np.ndarray = records[name]
    return starts


def _of_tokens(tokens: np.ndarray, offset: int) -> Segment:
    return Segment(
        fields=tokens.dtype.names or (),
        offset=offset if len(tokens) else 0,
        stride=tokens.dtype.itemsize,
        count=len(tokens),
    )


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

    def ends_with(self, end: int, values: np.ndarray) -> bool:
        """Whether the values are the last thing of what was written up to ``end``, in one piece."""
        start, part = next(
            (at, part) for at, part in zip(self.starts, self.parts, strict=True) if at + len(part) >= end
        )
        held = memoryview(part)[end - values.nbytes - start : end - start]
        return bool(values.nbytes == 0 or held == values.view(np.uint8).data)

    def tell(self) -> int:
        return self._end

    def writable(self) -> bool:
        return True


def check(data: bytes, dtype: np.dtype, rows: int, segments: Sequence[Segment], token: np.dtype | None = None) -> str:
    """What is wrong with a shard as a Parquet file, or "": run it where a crash does no harm.

    There may be one row group of uncompressed fixed-size columns, whose values are those at the committed offsets; with
    ``token`` also one of lists of tokens, of the lengths that the rows say.
    """
    names = dtype.names
    assert names
    columns = len(names) + (token is not None)
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, memory_map=False)
    held = file.metadata
    if (held.num_rows, held.num_row_groups, held.num_columns) != (rows, 1, columns):
        return f"it holds {held.num_rows} rows, {held.num_row_groups} groups and {held.num_columns} columns"
    group = held.row_group(0)
    for i, (name, segment) in enumerate(zip(names, segments, strict=token is None)):
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
    if token is None:
        return ""
    starts = _starts(read_segments(np.frombuffer(data, np.uint8), rows, dtype, segments))
    return _problem_of_tokens(file, data, starts, segments[-1])


def _problem_of_tokens(file: pq.ParquetFile, data: bytes, starts: np.ndarray, segment: Segment) -> str:
    """What is wrong with the last column, or "": its values are where the commit says, its lists as the rows say."""
    number, name, size = file.metadata.num_columns - 1, segment.fields[0], segment.stride * (segment.count or 0)
    column, described = file.metadata.row_group(0).column(number), file.metadata.schema.column(number)
    if (column.path_in_schema, described.physical_type, described.length) != (
        f"{name}.list.element", "FIXED_LEN_BYTE_ARRAY", segment.stride,
    ):  # fmt: skip
        return f"its last column is {column.path_in_schema}, {described.physical_type} of {described.length} bytes"
    # Beside the values a page has two bits for each of them and for each empty list, in groups.
    most = size + ((segment.count or 0) + len(starts)) // 2 + (1 << 12)
    if column.compression != "UNCOMPRESSED" or not size <= column.total_uncompressed_size <= most:
        return f"column {name} is compressed, or not of the size of its tokens"
    if column.num_values > (segment.count or 0) + len(starts):
        return f"column {name} holds {column.num_values} values, expected {segment.count}"
    lists = file.read_row_group(0, [f"{name}.list.element"], use_threads=False).column(0).combine_chunks()
    if lists.null_count or lists.values.null_count or lists.offsets.to_numpy().tolist() != [*starts, segment.count]:
        return f"the lists of {name} are not of the lengths that the rows say"
    if b"".join(lists.values.to_pylist()) != data[segment.offset : segment.offset + size]:
        return f"the values of {name} are not those at the committed offset"
    return ""


def _describe(column: np.ndarray) -> dict[str, str]:
    return {"dtype": column.dtype.str, "shape": json.dumps(column.shape[1:])}
