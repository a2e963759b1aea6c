"""HDF5 shards: one contiguous, uncompressed compound dataset ``rows`` (of ragged features ``tokens`` too), in memory.

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


def encode(records: np.ndarray, tokens: np.ndarray | None = None) -> tuple[Parts, tuple[Segment, ...]]:
    """The parts of an HDF5 file with dataset ``rows`` (structured [N]), and its segments.

    With ``tokens`` (structured [n]) there is a second dataset of this name, unless there are none.
    """
    tables = {"rows": np.ascontiguousarray(records)}
    if tokens is not None and len(tokens):
        tables["tokens"] = np.ascontiguousarray(tokens)
    image = _Image(list(tables.values()))
    with h5py.File(image, "w", libver="latest", track_order=False) as file:
        offsets = {
            name: file.create_dataset(name, data=table, track_times=False).id.get_offset()
            for name, table in tables.items()
        }
    assert image.places <= set(offsets.values())
    segments = [_segment(records, offsets["rows"])]
    if tokens is not None:
        segments.append(_segment(tokens, offsets.get("tokens", 0), len(tokens)))
    return image.parts(), tuple(segments)


def _segment(table: np.ndarray, offset: int, count: int | None = None) -> Segment:
    names = table.dtype.names
    assert names
    return Segment(fields=names, offset=offset, stride=table.dtype.itemsize, count=count)


class _Image(io.RawIOBase):
    """The file as the library writes it. Where it writes a table's own memory, that is noted and not copied."""

    def __init__(self, tables: Sequence[np.ndarray]) -> None:
        self._tables = [table.reshape(-1).view(np.uint8) for table in tables]
        self._rest = io.BytesIO()
        self._end = 0
        self._at: dict[int, np.ndarray] = {}

    @property
    def places(self) -> set[int]:
        """Where tables stand that were not copied."""
        return set(self._at)

    def write(self, data: Any) -> int:
        held, at = np.frombuffer(data, np.uint8), self._rest.tell()
        own = [t for t in self._tables if held.size == t.size and held.ctypes.data == t.ctypes.data]
        if own:
            self._at[at] = own[0]
            self._rest.seek(at + held.size)
        else:
            self._rest.write(held.data)
        self._end = max(self._end, self._rest.tell())
        return held.size

    def parts(self) -> Parts:
        rest, end = self._rest, 0
        parts: list[bytes | memoryview] = []
        for at, table in sorted(self._at.items(), key=lambda item: item[0]):
            rest.seek(end)
            parts += [rest.read(at - end).ljust(at - end, b"\0"), table.data]
            end = at + table.size
        rest.seek(end)
        return merged((*parts, rest.read()))

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


def check(data: bytes, dtype: np.dtype, rows: int, segments: Sequence[Segment], token: np.dtype | None = None) -> str:
    """What is wrong with a shard as an HDF5 file, or "": run it where a crash does no harm.

    There may be one hard link, to one plain dataset of this type and shape, at the offset that was committed (and with
    ``token`` one more, to the tokens): no external link or storage, virtual dataset, filter, attribute or other object
    that a reader might follow.
    """
    wanted = {"rows": (dtype, rows, segments[0])}
    if token is not None and segments[-1].count:
        wanted["tokens"] = (token, segments[-1].count, segments[-1])
    with h5py.File(io.BytesIO(data), "r") as file:
        root = h5py.h5g.open(file.id, b"/")
        kinds = [root.links.get_info(name.encode()).type for name in wanted]
        if root.get_num_objs() != len(wanted) or any(kind != h5py.h5l.TYPE_HARD for kind in kinds):
            return f"it holds more or other links than one to its {' and one to its '.join(wanted)}"
        if h5py.h5a.get_num_attrs(root):
            return "it has attributes"
        found = {name: h5py.h5o.open(file.id, name.encode()) for name in wanted}
        problems = [_problem(name, found[name], *wanted[name]) for name in wanted]
    return next(filter(None, problems), "")


def _problem(name: str, found: object, dtype: np.dtype, count: int, segment: Segment) -> str:
    """What is wrong with a dataset of ``count`` records, or ""."""
    if not isinstance(found, h5py.h5d.DatasetID):
        return f"its {name} are no dataset"
    how = found.get_create_plist()
    if how.get_layout() != h5py.h5d.CONTIGUOUS or how.get_external_count() or how.get_nfilters():
        return f"its {name} are not stored contiguously, unfiltered and in the file itself"
    if h5py.h5a.get_num_attrs(found):
        return "it has attributes"
    if found.shape != (count,) or found.dtype != dtype:
        return f"its {name} are {found.dtype} {found.shape}, expected {dtype} ({count},)"
    if found.get_offset() != segment.offset or found.get_storage_size() != count * dtype.itemsize:
        return f"its {name} do not lie where the commit says"
    return ""
