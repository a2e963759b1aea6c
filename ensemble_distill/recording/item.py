"""An item of work while it is captured: batch by batch into records, with the statistics of what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.groups import Group, field_name
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.cache.ragged import Tokens, unpacked
from ensemble_distill.codec import AnyCodec, Features, Members, PartnerKey, RowFigures
from ensemble_distill.codecs import features, heads
from ensemble_distill.ensemble.ensemble import Ran
from ensemble_distill.fingerprint import KEY_BYTES
from ensemble_distill.metrics import count
from ensemble_distill.recording.fidelity import fidelity
from ensemble_distill.recording.shown import Shown
from ensemble_distill.recording.stages import Stage
from ensemble_distill.tally import Tally
from ensemble_distill.targets import Said

FIDELITY_ROWS = 32


@dataclass(frozen=True)
class Piece:
    """One batch of a work item."""

    item: WorkItem
    first: int
    shown: Shown
    last_of_item: bool


class OpenItem:
    """The records of one work item while they are filled; ``missing`` rows are still to come.

    groups: those that the item lacks. stages: of the predictions, up to the last that it lacks. running: the members
    whose predictions or features are wanted.
    """

    def __init__(self, item: WorkItem, plan: Plan, known: Sequence[Stage], groups: Sequence[Group]) -> None:
        self.item, self.groups = item, groups
        rows = self.missing = item.rows
        self._names = {group.name for group in groups}
        lacking = [n for n, stage in enumerate(known) if self.lacks(stage)]
        self.stages = known[: lacking[-1] + 1] if lacking else ()
        self.running = {tap_member(head) for g in groups for head, c in g.codecs.items() if isinstance(c, Features)}
        self.running |= {name for n in lacking for name in known[n].own}
        # zeros: the padding inside records is part of what is hashed and committed
        self.records = {g.name: np.zeros(rows, g.dtype) for g in groups}
        self.tokens = {g.name: Tokens(g.token) for g in groups if g.token is not None}
        self.keys = np.empty((rows, 16), np.uint8)
        self.partners: list[tuple[np.ndarray, np.ndarray]] = []  # rows and keys that the samples are mixed with
        classes = len(plan.reading.classes)
        self.tallies = {known[n].group.name: Tally.empty([*known[n].names, "ensemble"], classes) for n in lacking}
        self._uncoded: list[Tensor] = []

    def lacks(self, stage: Stage) -> bool:
        return stage.group.name in self._names

    def part(self, piece: Piece) -> slice:
        """Where the rows of a batch stand in the records."""
        start = piece.first - self.item.first
        return slice(start, start + len(piece.shown.keys))

    def add_said(self, stage: Stage, piece: Piece, said: Said) -> None:
        """The predictions of a stage that the item lacks, and its statistics."""
        part = self.part(piece)
        for head, codec in stage.group.codecs.items():
            self._put(stage.group, head, part, encoded(codec, said))
        if stage is self.stages[0] and part.start < FIDELITY_ROWS:
            self._uncoded.append(said.logprobs[: FIDELITY_ROWS - part.start].cpu().clone())
        predictors = [*said.members, said.logprobs]
        count(self.tallies[stage.group.name], predictors, piece.shown.labels, stage.mixture)

    def add(self, piece: Piece, ran: Ran) -> None:
        """Keys and features of a batch, which then is done."""
        part = self.part(piece)
        self.keys[part] = piece.shown.keys
        if (partners := piece.shown.partners) is not None:
            self.partners.append((partners.rows, partners.keys))
        for group in self.groups:
            for head, codec in group.codecs.items():
                if isinstance(codec, Features):
                    self._put(group, head, part, self._feature(group, head, codec, ran))
        self.missing -= len(piece.shown.keys)

    def _put(self, group: Group, head: str, part: slice, arrays: Mapping[str, Tensor | np.ndarray]) -> None:
        for name, values in arrays.items():
            held = values.cpu().numpy() if isinstance(values, Tensor) else values
            self.records[group.name][field_name(head, name)][part] = held

    def _feature(self, group: Group, head: str, codec: Features, ran: Ran) -> Mapping[str, Tensor | np.ndarray]:
        """The arrays of a feature as they stand in rows; the tokens of a ragged one go to those of the unit."""
        whole = encoded_feature(codec, head, ran)
        if codec.mask is None:
            return whole
        arrays = {name: values.cpu().numpy() for name, values in whole.items()}
        (token,) = codec.token()
        mask = unpacked(arrays["mask"], group.most_tokens)
        start = self.tokens[group.name].add(mask, arrays.pop(token))
        return arrays | {"start": start}

    def measure(self) -> None:
        """Add what the codec of the first predictions lost in the first rows: what stands in the records, decoded."""
        if not self._uncoded:
            return
        stage, uncoded = self.stages[0], torch.cat(self._uncoded)
        arrays = stage.arrays(self.records[stage.group.name][: len(uncoded)])
        lost = fidelity(heads.decode(stage.head, arrays, stage.mixture), uncoded)
        self.tallies[stage.group.name].add("fidelity", lost)


def encoded(codec: AnyCodec, said: Said) -> dict[str, Tensor]:
    """The arrays that a codec of predictions, of figures or of partners makes of a batch; zeros without partners."""
    if isinstance(codec, PartnerKey):
        keys = np.zeros((len(said.logprobs), KEY_BYTES), np.uint8) if said.partner_keys is None else said.partner_keys
        return {"": torch.tensor(keys)}
    if isinstance(codec, RowFigures):
        return heads.encode_figures(said)
    if isinstance(codec, Members):
        said = replace(said, members=[said.members[said.names.index(name)] for name in codec.members])
    assert not isinstance(codec, Features), "features are of members, and not of what the ensemble said"
    return heads.encode(codec, said)


def encoded_feature(codec: AnyCodec, head: str, ran: Ran) -> dict[str, Tensor]:
    """The arrays that a codec makes of a tap's feature."""
    assert isinstance(codec, Features)
    return features.encode(codec, ran.features[head], head, ran.masks.get(head))


def tap_member(head: str) -> str:
    """The member of ``tap/<member>.<module>``."""
    return head.removeprefix("tap/").partition(".")[0]
