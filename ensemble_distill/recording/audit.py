"""Audit: do the teachers still say what the cache holds? They are run again on random rows, and both are compared.

What a difference may come from, and how much it may be, is in docs/statistics.md. Draws are functions of seed, key and
view, so what is encoded anew is the same bytes, unless the members' last bits differ on this device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ensemble_distill.cache.cache import Cache
from ensemble_distill.cache.groups import MAIN, field_name
from ensemble_distill.cache.plan import Plan
from ensemble_distill.codec import Dense, Features, HeadCodec, Members, TopK, VarOpt
from ensemble_distill.codecs.features import decode as decode_feature
from ensemble_distill.codecs.features import spread
from ensemble_distill.codecs.heads import decode
from ensemble_distill.config import CacheConfig, DataConfig
from ensemble_distill.device import memory_errors
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import Loaded
from ensemble_distill.errors import Mismatch
from ensemble_distill.phase import Phase, Report, silent
from ensemble_distill.recording.fidelity import scattered
from ensemble_distill.recording.item import encoded, encoded_feature
from ensemble_distill.recording.shown import show
from ensemble_distill.recording.stages import Stage, stages
from ensemble_distill.sources.arrays import Source
from ensemble_distill.targets import Targets

# What the last bits of a member's arithmetic may do to a log-probability, relative to one plus its size; and to a
# distribution, in total variation.
ROUNDING = {"fp32": 1e-3, "bf16": 5e-2}
HALF = 2.0**-10  # two roundings to float16
LOWEST = -65504.0
NOTHING = -100.0  # a log-probability from which on the rest is the same to float32
DECODED = "targets"


@dataclass
class Difference:
    """One field, as captured and anew. equal: values whose bytes are the same. largest, mean: of |captured − anew|.

    largest and mean are None for codes, which are compared decoded; ``targets`` is that: the total variation of a row.
    worst: the largest difference as a share of what is allowed, and where it is.
    """

    values: int = 0
    equal: int = 0
    largest: float | None = None
    total: float = 0.0
    worst: float = 0.0
    allowed: float | None = None
    where: str = ""

    def add(self, difference: Tensor, allowed: Tensor, names: list[str]) -> None:
        """Differences and what is allowed of each, float64 [B, …], of the rows of these names."""
        difference, allowed = difference.reshape(len(names), -1), allowed.reshape(len(names), -1)
        self.total += float(difference.sum())
        self.largest = max(self.largest or 0.0, float(difference.max()))
        share = (difference / allowed).amax(dim=1)
        row = int(share.argmax())
        if self.allowed is None or float(share[row]) > self.worst:
            at = int((difference[row] / allowed[row]).argmax())
            self.worst, self.where, self.allowed = float(share[row]), names[row], float(allowed[row, at])

    def report(self) -> dict[str, float | str | None]:
        return {
            "equal": self.equal / max(1, self.values),
            "largest": self.largest,
            "mean": None if self.largest is None else self.total / max(1, self.values),
            "allowed": self.allowed,
            "share_of_allowed": self.worst,
            "where": self.where,
        }


@dataclass
class Audit:
    """rows: compared, by split. fields: by split and field."""

    rows: dict[str, int] = field(default_factory=dict)
    fields: dict[str, dict[str, Difference]] = field(default_factory=dict)

    @property
    def unexplained(self) -> list[tuple[str, str, Difference]]:
        """Split, field and difference of what is more than allowed, the worst first."""
        found = [(s, name, d) for s, parts in self.fields.items() for name, d in parts.items() if d.worst > 1]
        return sorted(found, key=lambda part: -part[2].worst)


def check_members(plan: Plan, members: list[Loaded], config: CacheConfig) -> None:
    """Mismatch, naming the member, unless these are the members of the plan, combined in the same way."""
    held, names = plan.capture.members, [member.config.name for member in members]
    if names != [member.name for member in held]:
        before = ", ".join(member.name for member in held)
        raise Mismatch(
            f"the cache was captured with members {before}, the pipeline has {', '.join(names)}",
            hint="give the pipeline that the cache was captured with",
        )
    fitted = plan.capture.calibration is not None
    if fitted != (config.calibrate is not None):
        raise Mismatch(f"the cache was captured {'with' if fitted else 'without'} calibrate", hint="restore it")
    expected = zip(held, members, config.shares, plan.reading.temperature_before, strict=True)
    for old, new, share, temperature in expected:
        who = f"member {old.name!r} is not the one of the cache: its"
        _same(f"{who} weights", old.weights, new.weights)
        _same(f"{who} structure", old.structure, new.structure)
        _same(f"{who} version", old.version, new.config.version)
        _same(f"{who} share", old.share, share)
        if not fitted:
            _same(f"{who} temperature", temperature, new.config.temperature)
    whole = "the ensemble is not the one of the cache: its"
    _same(f"{whole} combine rule", plan.reading.combine, config.combine)
    if not fitted:
        _same(f"{whole} temperature", plan.reading.temperature_after, config.temperature)
    taps = {tap.field: tap for tap in config.taps}
    heads = ((head, codec) for group in plan.groups for head, codec in group.codecs.items())
    for head, codec in ((head, codec) for head, codec in heads if isinstance(codec, Features)):
        if head not in taps:
            raise Mismatch(f"the cache holds {head}, for which cache() has no tap", hint="restore the tap")
        for name, now in (("values", taps[head].values), ("take", taps[head].recipe), ("project", taps[head].project)):
            _same(f"{head} is taken in another way than in the cache: its {name}", getattr(codec, name), now)


def _same(what: str, before: object, now: object) -> None:
    if before != now:
        raise Mismatch(
            f"{what} was {_short(before)}, is {_short(now)}",
            hint="restore it, or capture anew into another directory",
        )


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def audit(
    cache: Cache,
    ensemble: Ensemble,
    data: DataConfig,
    sources: Mapping[str, Source],
    rows: int,
    seed: int,
    batch_size: int | None = None,
    report: Report = silent,
) -> Audit:
    """Compare up to ``rows`` random rows of each split, each in a random view, with what the members say now.

    ``report`` hears of each batch. Raises Mismatch for samples, labels or partners that are not those of the cache.
    """
    cache.check(data)
    result, batch_size = Audit(), batch_size or cache.plan.capture.batch_size
    ensemble.temper(cache.plan.reading.temperature_before, cache.plan.reading.temperature_after)
    # A plan that was read back has no functions in its transforms.
    plan = cache.plan.model_copy(update={"reading": cache.plan.reading.model_copy(update={"views": data.views})})
    chosen = {
        split: _chosen(cache, sources, split, rows, np.random.default_rng([seed, number]))
        for number, split in enumerate(sorted(cache.parts))
    }
    phase = Phase("comparing", sum(len(index) for index, _ in chosen.values()), report)
    for split, (drawn, views) in chosen.items():
        result.rows[split], found = len(drawn), result.fields.setdefault(split, {})
        for view in np.unique(views):
            index = drawn[views == view]
            for part in np.array_split(index, -(-len(index) // batch_size)):
                with memory_errors(batch_size):
                    _compare(found, cache, plan, ensemble, sources[split], split, int(view), part)
                phase.add(len(part))
    return result


def _chosen(
    cache: Cache, sources: Mapping[str, Source], split: str, rows: int, chance: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a split to compare, in order, and the view of each; int64 [N]."""
    if split not in sources:
        raise Mismatch(f"the pipeline has no split {split!r}, which {cache.root} holds")
    cache.check_labels(sources[split], split)
    positions = cache.positions(sources[split], split)
    index = np.sort(chance.choice(positions, min(rows, len(positions)), replace=False))
    return index, chance.integers(0, cache.parts[split].views, len(index))


def _compare(
    found: dict[str, Difference],
    cache: Cache,
    plan: Plan,
    ensemble: Ensemble,
    source: Source,
    split: str,
    view: int,
    index: np.ndarray,
) -> None:
    """Add a batch of rows in one view to the differences by field."""
    shown = show(source, plan, plan.item(plan.number(split, view, 0)), index)
    ran, keys = ensemble.run(shown.inputs), shown.keys
    known = {stage.group.name: stage for stage in stages(plan)}
    rows = cache.table(split).rows(keys, index)
    if shown.partners is not None:
        cache.check_partners(shown.partners, split, view, rows, index)
    rounding = ROUNDING[cache.plan.capture.precision]
    names = [f"sample {i} in view {view} (key {k.tobytes().hex()})" for i, k in zip(index, keys, strict=True)]
    for group in cache.plan.groups:
        held = cache.arrays_at(group, rows, view, split)
        if (stage := known.get(group.name)) is not None:
            said = stage.said(ensemble, ran, {}, shown, view)
            anew = {head: _on_cpu(encoded(codec, said)) for head, codec in group.codecs.items()}
        else:
            anew = {head: _on_cpu(encoded_feature(codec, head, ran)) for head, codec in group.codecs.items()}
        for head in group.codecs:
            for name, old in held[head].items():
                place = found.setdefault(field_name(head, name), Difference())
                _count_equal(place, old, anew[head][name])
                if old.dtype == torch.float16 and not isinstance(group.codecs[head], VarOpt):
                    _add_figures(place, old, anew[head][name], rounding, names, NOTHING if head == MAIN else LOWEST)
        for head, codec in group.codecs.items():
            if isinstance(codec, Features) and codec.values != "fp16":
                _add_features(
                    found.setdefault(f"{head} (decoded)", Difference()), codec, held[head], anew[head], rounding, names
                )
        if stage is not None:
            _add_targets(found.setdefault(DECODED, Difference()), cache, stage, held[MAIN], anew[MAIN], names)


def _on_cpu(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in arrays.items()}


def _count_equal(place: Difference, old: Tensor, new: Tensor) -> None:
    a, b = (x.view(torch.int16) if x.dtype == torch.float16 else x for x in (old, new))  # so that NaN equals NaN
    place.values += old.numel()
    place.equal += int((a == b).sum())


def _add_figures(place: Difference, old: Tensor, new: Tensor, rounding: float, names: list[str], lowest: float) -> None:
    """Differences of float16 values, of which all below ``lowest`` are one."""
    a, b = (
        x.double().nan_to_num(-LOWEST, -LOWEST, LOWEST).clamp(min=lowest).reshape(len(names), -1) for x in (old, new)
    )
    size = torch.maximum(a.abs(), b.abs())
    if size.numel():
        place.add((a - b).abs(), HALF * size + rounding * size.amax(dim=1, keepdim=True).clamp(min=1), names)


def _add_features(
    place: Difference,
    codec: Features,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    rounding: float,
    names: list[str],
) -> None:
    """Differences of decoded features against a step of their codec and the members' rounding."""
    a, b = (decode_feature(codec, arrays).double().reshape(len(names), -1) for arrays in (old, new))
    size = torch.maximum(a.abs(), b.abs())
    largest = size.amax(dim=1, keepdim=True)
    step = size * 2**-7
    if codec.values == "int8":  # the next code, and the next scale
        scales = (spread(codec, arrays["scale"].double()).expand(old["codes"].shape) for arrays in (old, new))
        step = torch.maximum(*scales).reshape(len(names), -1) + HALF * size
    place.values += a.numel()
    place.equal += int((a == b).sum())
    place.add((a - b).abs(), step + rounding * largest.clamp(min=1), names)


def _add_targets(
    place: Difference,
    cache: Cache,
    stage: Stage,
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    names: list[str],
) -> None:
    """The total variation of decoded rows against what the codec and the members' rounding explain."""
    codec = cast(HeadCodec, stage.group.codecs[MAIN])
    a, b = (decode(codec, arrays, stage.of_its_own) for arrays in (old, new))
    rest = torch.zeros(len(names), dtype=torch.float64)
    if a.residual is not None and b.residual is not None:
        rest = (a.residual.double() - b.residual.double()).abs()
    variation = ((scattered(a) - scattered(b)).abs().sum(dim=1) + rest) / 2
    rounding = ROUNDING[cache.plan.capture.precision]
    allowed = torch.full_like(variation, rounding) + explained(codec, old, new, a, b, rounding)
    place.values += len(names)
    place.equal += int((variation == 0).sum())
    place.add(variation, allowed, names)


def explained(
    codec: HeadCodec, old: Mapping[str, Tensor], new: Mapping[str, Tensor], a: Targets, b: Targets, rounding: float
) -> Tensor:
    """What the codec makes of a difference in the last bits, in total variation, float64 [B].

    float16: 2⁻¹⁰ of a log-probability that counts. 8 bits: a code may be the next one, which is a step of the row's
    range. Kept classes: the least likely of them may be another. Draws: two of them may be others, and as many more as
    the rounding may move.
    """
    size = HALF * (a.logprobs.double().exp() * a.logprobs.double().clamp(min=-100)).abs().sum(dim=1)
    size = size + torch.maximum(_steps(codec, old), _steps(codec, new))
    if a.kind == "dense":
        return size
    weights = [targets.logprobs.double().exp().amin(dim=1) for targets in (a, b)]
    least = torch.maximum(*weights)
    return size + 2 * least + (4 * rounding if a.kind == "unbiased" else 0.0)


def _steps(codec: HeadCodec, arrays: Mapping[str, Tensor]) -> Tensor:
    """The largest step between codes of each row, nats; 0 where values are float16."""
    inner = codec.inner if isinstance(codec, Members) else codec
    coded = (isinstance(inner, Dense) and inner.bits == 8) or (isinstance(inner, TopK) and inner.values == 8)
    first = next(iter(arrays.values()))
    steps = torch.zeros(len(first), dtype=torch.float64)
    if coded or isinstance(inner, VarOpt):
        for name, ends in arrays.items():
            if name.endswith("range"):
                steps = torch.maximum(steps, (ends[:, 1].double() - ends[:, 0].double()).abs() / 254)
    return steps
