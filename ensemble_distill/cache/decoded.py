"""``verify --deep``: the rows of a shard decoded as a reader would, and refused where no codec writes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ensemble_distill.cache.groups import Group, field_name, padded_arrays
from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.ragged import read_table
from ensemble_distill.codec import Features, HeadCodec, Members, PartnerKey, RowFigures
from ensemble_distill.codecs.domain import BadRow, check_figures
from ensemble_distill.codecs.features import decode as decode_feature
from ensemble_distill.codecs.heads import decode
from ensemble_distill.errors import Corrupt
from ensemble_distill.mixture import Mixture
from ensemble_distill.store.records import Commit

ROWS, BYTES = 4096, 16 << 20  # at once: ragged rows may be far larger than they are in the shard


class Decoder:
    """A check of shards for ``verify``: Corrupt for a row that no codec of the plan writes."""

    def __init__(self, plan: Plan) -> None:
        reading, members = plan.reading, plan.capture.members
        shares = tuple((member.name, member.share) for member in members)
        self._mixture = Mixture(shares, reading.combine, reading.temperature_after)
        self._classes = len(reading.classes)

    def __call__(self, data: bytes, commit: Commit, group: Group, where: str) -> None:
        first, step = 0, max(1, min(ROWS, BYTES // group.padded.itemsize))
        try:
            table = read_table(np.frombuffer(data, np.uint8), commit, group)
            for first in range(0, commit.rows, step):
                self._decode(table.take(np.arange(first, min(first + step, commit.rows))), group)
        except BadRow as error:
            raise Corrupt(f"{where}: its row {first + error.row}: {error.problem}") from error

    def _decode(self, records: np.ndarray, group: Group) -> None:
        for head, codec in group.codecs.items():
            arrays = {name: torch.from_numpy(records[field_name(head, name)].copy()) for name in padded_arrays(codec)}
            if isinstance(codec, Features):
                decode_feature(codec, arrays)
            elif isinstance(codec, RowFigures):
                check_figures(arrays, self._classes)
            elif not isinstance(codec, PartnerKey):
                decode(codec, arrays, self._mixture_of(codec))

    def _mixture_of(self, codec: HeadCodec) -> Mixture:
        """Of the members that a group keeps, where each append of members has one of its own."""
        if not isinstance(codec, Members):
            return self._mixture
        return replace(self._mixture, shares=tuple(part for part in self._mixture.shares if part[0] in codec.members))
