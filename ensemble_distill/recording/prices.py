"""What a capture would take with each codec: bytes, seconds, error; and when it has paid for itself."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.plan import Plan
from ensemble_distill.codec import Features, HeadCodec
from ensemble_distill.config import CacheConfig, DataConfig
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.errors import UsageError
from ensemble_distill.explain import explain
from ensemble_distill.formats import encode
from ensemble_distill.phase import Report, silent
from ensemble_distill.recording.offers import as_written, default_sizes, name_of, offers, size_of
from ensemble_distill.recording.planning import Pieces, load_pieces, make_plan
from ensemble_distill.recording.probe import Measured, Probe, Seconds, hashing_seconds, host_peak
from ensemble_distill.sources.arrays import Source


@dataclass(frozen=True)
class Price:
    """One codec's. seconds: of the whole capture. epochs: of a student, after which it is paid; None if never."""

    codec: HeadCodec
    own: bool
    bytes_per_row: int
    bytes: int
    units: int
    seconds: float
    epochs: float | None
    error: dict[str, float | None]


@dataclass(frozen=True)
class TapPrice:
    """What one tap adds to every codec's price. distortion: of distances by its projection; None without one.

    tokens: of a ragged one, the mean number of real ones in the rows of the probe, by which its bytes are estimated.
    """

    field: str
    codec: Features
    bytes_per_row: int
    bytes: int
    distortion: float | None
    tokens: float | None


@dataclass(frozen=True)
class PriceList:
    """left_out: codecs that cannot be captured here, and why. memory: bytes, by what takes them."""

    plan: Plan
    taps: list[TapPrice]
    prices: list[Price]
    left_out: list[tuple[HeadCodec, str]]
    devices: list[str]
    memory: dict[str, Any]
    batches: int
    probed: int
    seconds_per_row: dict[str, float]

    @property
    def own(self) -> Price:
        return next(price for price in self.prices if price.own)


def price_list(
    data: DataConfig,
    config: CacheConfig,
    sources: Mapping[str, Source],
    devices: Sequence[torch.device],
    sizes: Sequence[int] | None = None,
    batches: int = 5,
    workers: int = 1,
    report: Report = silent,
) -> PriceList:
    """Price the pipeline's codec and all others on ``batches`` batches of its sources. Nothing is written.

    sizes: how many classes to keep or draw; by default some that suit the number of classes. report: hears of each
    batch. Raises what planning a capture raises, and InvalidOutput where a member fails on a batch.
    """
    config = config.model_copy(update={"codec": as_written(config.codec)})
    pieces, ensemble = load_pieces(data, config, sources, devices, config.precision)
    own = make_plan(pieces, config)
    plans, left_out = _plans(pieces, config, sizes or default_sizes(len(data.classes)))
    plans = {config.codec: own, **plans} if config.codec not in plans else plans
    probe = Probe({name_of(codec): plan for codec, plan in plans.items()}, own, ensemble, sources)
    measured = probe.run(batches, report)
    teller = Teller(measured, ensemble.devices, workers, hashing_seconds())
    return PriceList(
        plan=own,
        taps=tap_prices(own, teller.tokens),
        prices=[teller.price(codec, plan, codec == config.codec) for codec, plan in plans.items()],
        left_out=left_out,
        devices=[str(device) for device in dict.fromkeys(ensemble.devices)],
        memory=memory(own, ensemble, measured, workers),
        batches=measured.batches,
        probed=measured.rows,
        seconds_per_row=teller.per_row(own),
    )


def _plans(
    pieces: Pieces, config: CacheConfig, sizes: Sequence[int]
) -> tuple[dict[HeadCodec, Plan], list[tuple[HeadCodec, str]]]:
    """The plan of a capture with each codec on offer; and the codecs that have none, and why."""
    plans, left_out, classes = {}, [], len(pieces.data.classes)
    for codec in offers(sizes):
        if (size_of(codec) or 0) > classes:
            left_out.append((codec, f"there are {classes} classes"))
            continue
        try:
            plans[codec] = make_plan(pieces, type(config)(**{**dict(config), "codec": codec}))
        except UsageError as error:
            left_out.append((codec, str(error)))
        except ValidationError as error:
            left_out.append((codec, explain(error, CacheConfig)))
    return plans, left_out


class Teller:
    """Seconds of captures, from what the probe measured of a row."""

    def __init__(self, measured: Measured, devices: Sequence[torch.device], workers: int, hashing: float) -> None:
        self.measured, self.workers, self.hashing = measured, workers, hashing
        self.tokens = {tap: count / measured.rows for tap, count in measured.tokens.items()}
        # A device computes while the host reads; a host's cores do the one or the other.
        self.beside = all(device.type != "cpu" for device in devices)

    def price(self, codec: HeadCodec, plan: Plan, own: bool) -> Price:
        name, stored = name_of(codec), stored_bytes(plan, self.tokens)
        seconds = self._capture(name, plan, stored)
        train = plan.splits.get("train")
        saved = self._per_view(self.measured.seconds.teachers, train.views) if train else 0.0
        saved -= statistics.median(self.measured.seconds.decode[name])
        return Price(
            codec=codec,
            own=own,
            bytes_per_row=round(sum(_row_bytes("hdf5", group, self.tokens) for group in plan.groups)),
            bytes=stored,
            units=plan.units,
            seconds=seconds,
            epochs=seconds / (train.rows * saved) if train and saved > 0 else None,
            error=self.measured.error(name),
        )

    def per_row(self, plan: Plan) -> dict[str, float]:
        """Seconds a row of reading and of the members, over all views."""
        seconds = self.measured.seconds
        kinds = {"reading": seconds.reading, "teachers": seconds.teachers}
        return {name: self._all(kind, plan) / plan.rows for name, kind in kinds.items()}

    def _capture(self, name: str, plan: Plan, stored: int) -> float:
        seconds = self.measured.seconds
        reading = self._all(seconds.reading, plan)
        rest = statistics.median(seconds.figures) + statistics.median(seconds.encode[name])
        computing = self._all(seconds.teachers, plan) + plan.rows * rest + stored * self.hashing
        return max(reading / self.workers, computing) if self.beside else reading + computing

    def _all(self, kind: dict[bool, list[float]], plan: Plan) -> float:
        """Seconds for all rows of a plan in all their views."""
        return sum(split.rows * split.views * self._per_view(kind, split.views) for split in plan.splits.values())

    def _per_view(self, kind: dict[bool, list[float]], views: int) -> float:
        """Seconds a row, the mean over its views: the first is as it is, the others are rendered."""
        as_it_is, rendered = Seconds.of(kind, False), Seconds.of(kind, True)
        return (as_it_is + (views - 1) * rendered) / views


def tap_prices(plan: Plan, tokens: Mapping[str, float]) -> list[TapPrice]:
    """What each tap takes, in the order of the plan. tokens: the mean number in a row, by ragged tap."""
    return [
        TapPrice(
            field=field,
            codec=codec,
            bytes_per_row=round(_row_bytes("hdf5", group, tokens)),
            bytes=_group_bytes(plan, group, tokens),
            distortion=plan.capture.distortions.get(field),
            tokens=tokens.get(field),
        )
        for group in plan.groups
        for field, codec in group.codecs.items()
        if isinstance(codec, Features)
    ]


def stored_bytes(plan: Plan, tokens: Mapping[str, float] | None = None) -> int:
    """What the shards of a plan take: their rows, and what the format writes around the rows of each."""
    return sum(_group_bytes(plan, group, tokens or {}) for group in plan.groups)


def _group_bytes(plan: Plan, group: Group, tokens: Mapping[str, float]) -> int:
    rows = round(plan.rows * _row_bytes(plan.format, group, tokens))
    return rows + plan.item_count * _overhead(plan.format, group)


def _row_bytes(format: str, group: Group, tokens: Mapping[str, float]) -> float:
    """Of the row and its tokens. Parquet keeps each field by itself, without the padding of the record."""
    names = group.dtype.names or ()
    row = sum(group.dtype[name].itemsize for name in names) if format == "parquet" else group.dtype.itemsize
    return row if group.token is None else row + tokens[next(iter(group.codecs))] * group.token.itemsize


def _overhead(format: str, group: Group) -> int:
    token = None if group.token is None else np.zeros(1, group.token)
    parts, _ = encode(format, np.zeros(1, group.dtype), token)
    return sum(map(len, parts)) - round(_row_bytes(format, group, dict.fromkeys(group.codecs, 1.0)))


def memory(plan: Plan, ensemble: Ensemble, measured: Measured, workers: int) -> dict[str, Any]:
    """Bytes of a capture, by what takes them.

    members: parameters and buffers. batch: the inputs of the batches that are read ahead or in use, and all
    log-probabilities of one. records: two work items, one being filled and one written. host_peak: the most that this
    process had during the probe, and the records. device_peak: the most that was allocated during the probe.
    """
    modules = [module for module in ensemble.modules if isinstance(module, nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    inputs = measured.batch_bytes * (2 * workers + 2)
    said = plan.capture.batch_size * len(plan.reading.classes) * 4 * (len(ensemble.modules) + 1)
    records = 2 * int(plan.item_rows().max()) * plan.bytes_per_row
    devices = [device for device in dict.fromkeys(ensemble.devices) if device.type == "cuda"]
    return {
        "members": sum(t.nbytes for t in tensors),
        "batch": inputs + said,
        "records": records,
        "host_peak": host_peak() + records,
        "device_peak": {str(device): torch.cuda.max_memory_allocated(device) for device in devices} or None,
    }
