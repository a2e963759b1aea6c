"""HDF5 shards: one contiguous, uncompressed compound dataset ``rows``, built in memory.

Built in memory, because an open HDF5 file that is killed is unreadable and a full disk under one ends in a
signal; contiguous, so that row i lies at ``offset + i * stride`` and training need not call the library. The library
writes around the rows; the rows themselves are handed on as they lie in memory.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from ensemble_distill.formats.layout import Parts, Segment, merged


def encode(records: np.ndarray) -> tuple[Parts, tuple[Segment, ...]]:
    """The parts of an HDF5 file with dataset ``rows`` (structured [N]), and its one segment."""
    records = np.ascontiguousarray(records)
    image = _Image(records)
    with h5py.File(image, "w", libver="latest", track_order=False) as file:
        dataset = file.create_dataset("rows", data=records, track_times=False)
        offset = dataset.id.get_offset()
    names = records.dtype.names
    assert names and image.rows_at in (offset, None)
    return image.parts(), (Segment(fields=names, offset=offset, stride=records.dtype.itemsize),)


class _Image(io.RawIOBase):
    """The file as the library writes it. Where it writes the records' own memory, that is noted and not copied."""

    def __init__(self, records: np.ndarray) -> None:
        self._rows = records.reshape(-1).view(np.uint8)
        self._rest = io.BytesIO()
        self._end = 0
        self.rows_at: int | None = None

    def write(self, data: Any) -> int:
        held, at = np.frombuffer(data, np.uint8), self._rest.tell()
        if held.size == self._rows.size and held.ctypes.data == self._rows.ctypes.data:
            self.rows_at = at
            self._rest.seek(at + held.size)
        else:
            self._rest.write(held.data)
        self._end = max(self._end, self._rest.tell())
        return held.size

    def parts(self) -> Parts:
        if self.rows_at is None:
            return (self._rest.getvalue(),)
        last, rest = self.rows_at + self._rows.size, self._rest
        rest.seek(0)
        head = rest.read(self.rows_at)
        rest.seek(last)
        tail = rest.read()
        return merged((head, self._rows.data, tail))

    def readinto(self, buffer: Any) -> int:
        raise io.UnsupportedOperation("a shard is written and never read here")

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._rest.seek(offset) if whence == 0 else self._rest.seek(self._end + offset)

    def tell(self) -> int:
        return self._rest.tell()

    def truncate(self, size: int | None = None) -> int:
        assert size is not None and size >= self._end, "the library ends a file where its last byte is"
        return size

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True


def check(data: bytes, dtype: np.dtype, rows: int, segments: Sequence[Segment]) -> str:
    """What is wrong with a shard as an HDF5 file, or "": run it where a crash does no harm.

    There may be one hard link, to one plain dataset of this type and shape, at the offset that was committed: no
    external link or storage, virtual dataset, filter, attribute or second object that a reader might follow.
    """
    with h5py.File(io.BytesIO(data), "r") as file:
        root = h5py.h5g.open(file.id, b"/")
        if root.get_num_objs() != 1 or root.links.get_info(b"rows").type != h5py.h5l.TYPE_HARD:
            return "it holds more or other links than one to its rows"
        found = h5py.h5o.open(file.id, b"rows")
        if not isinstance(found, h5py.h5d.DatasetID):
            return "its rows are no dataset"
        how = found.get_create_plist()
        if how.get_layout() != h5py.h5d.CONTIGUOUS or how.get_external_count() or how.get_nfilters():
            return "its rows are not stored contiguously, unfiltered and in the file itself"
        if h5py.h5a.get_num_attrs(found) or h5py.h5a.get_num_attrs(root):
            return "it has attributes"
        if found.shape != (rows,) or found.dtype != dtype:
            return f"its rows are {found.dtype} {found.shape}, expected {dtype} ({rows},)"
        if found.get_offset() != segments[0].offset or found.get_storage_size() != rows * dtype.itemsize:
            return "its rows do not lie where the commit says"
    return ""
