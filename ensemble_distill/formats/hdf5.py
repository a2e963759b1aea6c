"""HDF5 shards: one contiguous, uncompressed compound dataset ``rows``, built in memory.

Built in memory, because an open HDF5 file that is killed is unreadable and a full disk under one ends in a
signal; contiguous, so that row i lies at ``offset + i * stride`` and training need not call the library.
"""

from __future__ import annotations

import io

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
    assert names and data[offset : offset + size] == records.tobytes()
    return data, (Segment(fields=names, offset=offset, stride=records.dtype.itemsize),)
