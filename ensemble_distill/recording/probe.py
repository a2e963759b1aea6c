"""A few batches through reading, members and codecs: what each takes, and what each codec loses."""

from __future__ import annotations

import hashlib
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar, cast

import numpy as np
import torch

from ensemble_distill.cache.groups import MAIN, TARGETS, field_name
from ensemble_distill.cache.plan import Plan, WorkItem
from ensemble_distill.codec import Features, HeadCodec
from ensemble_distill.codecs import features, heads
from ensemble_distill.device import memory_errors
from ensemble_distill.ensemble.distributions import InvalidRow
from ensemble_distill.ensemble.ensemble import Ensemble, Ran
from ensemble_distill.errors import InvalidOutput
from ensemble_distill.metrics import count
from ensemble_distill.phase import Phase, Report, silent
from ensemble_distill.recording.estimate import errors
from ensemble_distill.recording.shown import Shown, show
from ensemble_distill.recording.stages import stages
from ensemble_distill.sources.arrays import Source
from ensemble_distill.tally import Tally
from ensemble_distill.targets import Said

# Errors are measured in float64 on so many log-probabilities of a batch at most.
MAX_CELLS = 1 << 22

T = TypeVar("T")


@dataclass
class Seconds:
    """Seconds a row, one figure a batch. reading, teachers: by whether the view was rendered."""

    reading: dict[bool, list[float]] = field(default_factory=lambda: defaultdict(list))
    teachers: dict[bool, list[float]] = field(default_factory=lambda: defaultdict(list))
    figures: list[float] = field(default_factory=list)
    encode: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    decode: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @staticmethod
    def of(kind: dict[bool, list[float]], rendered: bool) -> float:
        """The median of a kind of view; of the other kind, where the probe saw none of it."""
        return statistics.median(kind.get(rendered) or kind[not rendered])


@dataclass
class Measured:
    """What the probe found. errors: by codec, each batch's rows and figures. batch_bytes: of a batch's inputs.

    tokens: of ragged features, real ones in all batches, by tap.
    """

    seconds: Seconds = field(default_factory=Seconds)
    errors: dict[str, list[tuple[int, dict[str, float | None]]]] = field(default_factory=lambda: defaultdict(list))
    batches: int = 0
    rows: int = 0
    batch_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def error(self, name: str) -> dict[str, float | None]:
        """The mean over the rows of all batches; of batches, where a figure is of a batch as a whole."""
        parts = self.errors[name]
        return {figure: _mean([(rows, said[figure]) for rows, said in parts]) for figure in parts[0][1]}


def _mean(parts: Sequence[tuple[int, float | None]]) -> float | None:
    held = [(rows, value) for rows, value in parts if value is not None]
    return sum(rows * value for rows, value in held) / sum(rows for rows, _ in held) if held else None


class Probe:
    """Runs batches as the capture would, and writes nothing. plans: by the name of the codec that they hold."""

    def __init__(self, plans: Mapping[str, Plan], own: Plan, ensemble: Ensemble, sources: Mapping[str, Source]) -> None:
        self.plans, self.own, self.ensemble, self.sources = plans, own, ensemble, sources
        (self.stage,) = stages(own)
        self.tally = Tally.empty([*ensemble.names, "ensemble"])

    def run(self, batches: int, report: Report = silent) -> Measured:
        """Measure on so many batches, spread evenly over all that would be captured, after one to warm up.

        Raises InvalidOutput for a member that gives NaN, naming the sample; OutOfMemory.
        """
        chosen = spread(self.own, batches)
        phase = Phase("measuring", sum(len(index) for _, index in [chosen[0], *chosen]), report)
        with memory_errors(self.own.capture.batch_size):
            self._batch(Measured(), *chosen[0])
            phase.add(len(chosen[0][1]))
            measured = Measured()
            for item, index in chosen:
                self._batch(measured, item, index)
                phase.add(len(index))
        return measured

    def _batch(self, measured: Measured, item: WorkItem, index: np.ndarray) -> None:
        seconds, rows, rendered = measured.seconds, len(index), item.view > 0
        read = partial(show, self.sources[item.split], self.own, item, index)
        shown = self._timed(seconds.reading[rendered], rows, read)
        forward = partial(self._forward, item, index, shown)
        ran, said = self._timed(seconds.teachers[rendered], rows, forward)
        self._timed(seconds.figures, rows, partial(self._figures, said, ran))
        for name, plan in self.plans.items():
            self._codec(measured, name, plan, said)
        for tap, mask in ran.masks.items():
            measured.tokens[tap] += int(mask.sum())
        measured.batches += 1
        measured.rows += rows
        measured.batch_bytes = max(measured.batch_bytes, sum(x.nbytes for x in shown.inputs.values()))

    def _codec(self, measured: Measured, name: str, plan: Plan, said: Said) -> None:
        """One codec on a batch: to records and back, as a capture and a reader do it, and its errors."""
        seconds, rows = measured.seconds, len(said.logprobs)
        records = self._timed(seconds.encode[name], rows, partial(_encoded, plan, said))
        order = np.random.default_rng(0).permutation(rows)  # a reader gathers rows in any order
        self._timed(seconds.decode[name], rows, lambda: self._decode(plan, records[order]))
        few = _first(said, max(1, MAX_CELLS // said.logprobs.shape[1]))
        measured.errors[name].append((len(few.logprobs), errors(_head(plan), few, self.stage.mixture)))

    def _timed(self, kind: list[float], rows: int, function: Callable[[], T]) -> T:
        """What a function gives; the seconds that it took, by row, are added to their kind."""
        start = time.perf_counter()
        result = function()
        for device in dict.fromkeys(self.ensemble.devices):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        kind.append((time.perf_counter() - start) / rows)
        return result

    def _forward(self, item: WorkItem, index: np.ndarray, shown: Shown) -> tuple[Ran, Said]:
        try:
            ran = self.ensemble.run(shown.inputs)
            return ran, self.stage.said(self.ensemble, ran, {}, shown, item.view)
        except InvalidRow as error:
            raise InvalidOutput(
                f"{error} for sample {index[error.row]} of {item.split} "
                f"(view {item.view}, key {shown.keys[error.row].tobytes().hex()})",
                hint=f"look at what {error.member} does with this sample, or use --set precision=fp32",
            ) from error

    def _figures(self, said: Said, ran: Ran) -> None:
        """What every capture does with a batch, whatever its codec."""
        coded = [features.encode(self._tap(tap), f, tap, ran.masks.get(tap)) for tap, f in ran.features.items()]
        for array in (array for arrays in [heads.encode_figures(said), *coded] for array in arrays.values()):
            array.cpu()
        count(self.tally, [*said.members, said.logprobs], said.labels)

    def _tap(self, field: str) -> Features:
        return cast(Features, next(group.codecs[field] for group in self.own.groups if field in group.codecs))

    def _decode(self, plan: Plan, records: np.ndarray) -> None:
        codec = _head(plan)
        arrays = {name: torch.from_numpy(records[field_name(MAIN, name)]) for name in codec.arrays()}
        heads.decode(codec, arrays, self.stage.mixture)


def spread(plan: Plan, batches: int) -> list[tuple[WorkItem, np.ndarray]]:
    """Batches of a capture, evenly spaced over its rows in order, as (work item, rows int64 [B]); none twice."""
    ends = plan.item_rows().cumsum()
    chosen = {}
    for row in np.linspace(0, plan.rows, batches, endpoint=False) + plan.rows / batches / 2:
        number = int(np.searchsorted(ends, row, side="right"))
        item = plan.item(number)
        parts = np.array_split(np.arange(item.first, item.last), -(-item.rows // plan.capture.batch_size))
        within = item.first + int(row) - (int(ends[number]) - item.rows)
        part = next(part for part in parts if part[-1] >= within)
        chosen[item, int(part[0])] = (item, part)
    return list(chosen.values())


def hashing_seconds() -> float:
    """Seconds to hash a byte as a commit does: once as file, once as content."""
    block = bytes(1 << 22)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        hashlib.sha256(block)
        times.append(time.perf_counter() - start)
    return 2 * statistics.median(times) / len(block)


def host_peak() -> int:
    """The most memory that this process has had so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _head(plan: Plan) -> HeadCodec:
    return cast(HeadCodec, plan.group(TARGETS).codecs[MAIN])


def _encoded(plan: Plan, said: Said) -> np.ndarray:
    records = np.zeros(len(said.logprobs), plan.group(TARGETS).dtype)
    for name, values in heads.encode(_head(plan), said).items():
        records[field_name(MAIN, name)] = values.cpu().numpy()
    return records


def _first(said: Said, rows: int) -> Said:
    """The first rows of a batch."""
    return replace(
        said,
        logprobs=said.logprobs[:rows],
        members=[member[:rows] for member in said.members],
        labels=None if said.labels is None else said.labels[:rows],
        keys=said.keys[:rows],
        known=None if said.known is None else said.known[:rows],
        partner_keys=None if said.partner_keys is None else said.partner_keys[:rows],
    )
