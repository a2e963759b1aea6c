"""HDF5 shards: one contiguous, uncompressed compound dataset ``rows``, built in memory.

Built in memory, because an open HDF5 file that is killed is unreadable and a full disk under one ends in a
signal; contiguous, so that row i lies at ``offset + i * stride`` and training need not call the library.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import h5py
import numpy as np

from ensemble_distill.formats.layout import Segment


def encode(records: np.ndarray) -> tuple[bytes, tuple[Segment, ...]]:
    """The bytes of an HDF5 file with dataset ``rows`` (structured [N]), and its one segment."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver="latest", track_order=False) as file:
        dataset = file.create_dataset("rows", data=records, track_times=False)
        offset = dataset.id.get_offset()
    data = buffer.getvalue()
    size, names = records.nbytes, records.dtype.names
    held = np.frombuffer(data, np.uint8, size, offset)
    assert names and np.array_equal(held, np.ascontiguousarray(records).view(np.uint8))
    return data, (Segment(fields=names, offset=offset, stride=records.dtype.itemsize),)


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
