"""What each codec of predictions keeps of a batch, and the targets that it gives back. Parameters: see codec.py.

``encode`` runs where the teachers ran; arrays are named as ``arrays()`` of the codec says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ensemble_distill.codec import Dense, HeadCodec, Members, Sampled, TopK, VarOpt
from ensemble_distill.codecs.domain import check_dense, check_figures, check_ids, check_log_z, check_logs, check_rest
from ensemble_distill.codecs.packing import from_codes, normalised, pack_ids, to_codes, unpack_ids
from ensemble_distill.metrics import entropy
from ensemble_distill.mixture import Mixture, combine
from ensemble_distill.philox import uniforms
from ensemble_distill.targets import Said, Targets

LOWEST = -65504.0  # the lowest float16


def encode(codec: HeadCodec, said: Said) -> dict[str, Tensor]:
    """The arrays of a batch, [B, …] by name."""
    if isinstance(codec, Dense):
        return _encode_dense(codec, said.logprobs)
    if isinstance(codec, TopK):
        kept = _likeliest(said, codec.k)
        return {"ids": pack_ids(kept, codec.classes), **_encode_kept(codec, said.logprobs, kept)}
    if isinstance(codec, VarOpt):
        return _encode_varopt(codec, said)
    if isinstance(codec, Sampled):
        drawn = torch.searchsorted(_cumulative(said.logprobs), _uniforms(codec, said, codec.n), right=True)
        return {"ids": pack_ids(drawn.clamp(max=codec.classes - 1).sort(dim=1).values, codec.classes)}
    return _encode_members(codec, said)


def decode(codec: HeadCodec, arrays: Mapping[str, Tensor], mixture: Mixture | None = None) -> Targets:
    """Targets of a batch from its arrays. ``mixture`` says how members are combined, where the codec kept them.

    BadRow (Corrupt) for a row that ``encode`` does not write.
    """
    if isinstance(codec, Dense):
        return Targets(_decode_dense(codec, arrays), classes=codec.classes)
    if isinstance(codec, TopK):
        logprobs, residual = _decode_kept(codec, arrays)
        return Targets(
            logprobs, kind="ghost", ids=_ids(arrays, codec.k, codec.classes), residual=residual,
            log_z=_log_z(arrays, codec.classes), temperatures=codec.temperatures, classes=codec.classes,
        )  # fmt: skip
    if isinstance(codec, VarOpt):
        return _decode_varopt(codec, arrays)
    if isinstance(codec, Sampled):
        ids = _ids(arrays, codec.n, codec.classes, distinct=False)
        weights = torch.full(ids.shape, -math.log(codec.n), dtype=torch.float32, device=ids.device)
        return Targets(weights, kind="unbiased", ids=ids, classes=codec.classes)
    assert mixture is not None
    return _decode_members(codec, arrays, mixture)


def encode_figures(said: Said) -> dict[str, Tensor]:
    """The arrays of ``RowFigures``, float16 [B]; NaN for what cannot be known of them."""
    label = said.logprobs.new_full((len(said.logprobs),), math.nan)
    if said.labels is not None:
        index = said.labels.to(said.logprobs.device)[:, None]
        label = said.logprobs.gather(1, index)[:, 0].clamp(min=LOWEST)
        if said.known is not None:
            label = label.masked_fill(~said.known.gather(1, index)[:, 0], math.nan)
    figures = {
        "entropy": entropy(said.logprobs),
        "mutual_information": _mutual_information(said.members, said.shares),
        "label_logprob": label,
    }
    if said.known is not None:
        figures |= {name: torch.full_like(label, math.nan) for name in ("entropy", "mutual_information")}
    return {name: value.half() for name, value in figures.items()}


def with_figures(targets: Targets, arrays: Mapping[str, Tensor]) -> Targets:
    """The targets with what the arrays of ``RowFigures`` say of their rows; BadRow for what they cannot be."""
    check_figures(arrays, targets.classes)
    return replace(
        targets,
        entropy=arrays["entropy"].float(),
        mutual_information=arrays["mutual_information"].float(),
        label_logprob=arrays["label_logprob"].float(),
    )


def with_figures_of(targets: Targets, codec: HeadCodec, arrays: Mapping[str, Tensor], mixture: Mixture) -> Targets:
    """The targets with the figures of another mixture than the captured one, where the members' classes are all kept.

    What a label is worth to it cannot be known without the labels.
    """
    if not (isinstance(codec, Members) and isinstance(codec.inner, Dense)):
        return targets
    members = _members_logprobs(codec, arrays, mixture)
    spread = _mutual_information(members, [share for _, share in mixture.shares])
    return replace(targets, entropy=entropy(targets.logprobs), mutual_information=spread)


def _mutual_information(members_MBC: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """H(Σ w p) − Σ w H(p), [B], nats."""
    total = sum(shares)
    inner = sum(w / total * entropy(m) for w, m in zip(shares, members_MBC, strict=True))
    mixed: Tensor = entropy(combine(members_MBC, shares, "mean_probs")) - inner
    return mixed.clamp(min=0)


# Each codec -----------------------------------------------------------------------------------------


def _encode_dense(codec: Dense, logprobs_BC: Tensor) -> dict[str, Tensor]:
    if codec.bits == 8:
        return dict(zip(("codes", "range"), to_codes(logprobs_BC), strict=True))
    # Logs and not probabilities: float16 probabilities underflow to 0 below 6e-8, which makes a KL infinite.
    return {"logprobs": logprobs_BC.clamp(min=LOWEST).masked_fill(logprobs_BC.isneginf(), -math.inf).half()}


def _decode_dense(codec: Dense, arrays: Mapping[str, Tensor]) -> Tensor:
    stored = from_codes(arrays["codes"], arrays["range"]) if codec.bits == 8 else arrays["logprobs"].float()
    logprobs = torch.log_softmax(stored, dim=1)
    check_dense(logprobs)
    return logprobs


def _likeliest(said: Said, k: int) -> Tensor:
    """The k likeliest classes of those that are known, int64 [B, K]."""
    if said.known is None:
        return said.logprobs.topk(k, dim=1).indices
    return said.logprobs.masked_fill(~said.known, -math.inf).topk(k, dim=1).indices


def _encode_kept(codec: TopK, logprobs_BC: Tensor, kept_BK: Tensor) -> dict[str, Tensor]:
    """All arrays of a ``topk`` row but the ids."""
    # Over what is not kept, since one minus a sum near one is mostly rounding (and may be negative).
    rest = torch.logsumexp(logprobs_BC.scatter(1, kept_BK, -math.inf), dim=1)
    log_z = [torch.logsumexp(logprobs_BC / t, dim=1) for t in codec.temperatures]
    return {
        **_encode_values(codec.values, logprobs_BC.gather(1, kept_BK)),
        "residual": rest.clamp(min=LOWEST).masked_fill(rest.isneginf(), -math.inf).half(),
        **({"log_z": torch.stack(log_z, dim=1).half()} if log_z else {}),
    }


def _encode_values(bits: int, logprobs_BK: Tensor) -> dict[str, Tensor]:
    return _encode_dense(Dense(bits=8 if bits == 8 else 16), logprobs_BK)


def _decode_kept(codec: TopK, arrays: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, K] and residual [B]."""
    residual = _residual(arrays)
    values = arrays["logprobs"].float() if codec.values == 16 else from_codes(arrays["codes"], arrays["range"])
    check_logs(values, "kept values")
    check_rest(residual, torch.full_like(residual, codec.k < codec.classes, dtype=torch.bool))
    return normalised(values, residual, codec.values), residual


def _residual(arrays: Mapping[str, Tensor]) -> Tensor:
    """What all classes that are not kept have together, a probability, [B]."""
    logs = arrays["residual"].float()
    check_logs(logs, "residuals")
    return logs.exp()


def _ids(arrays: Mapping[str, Tensor], count: int, classes: int, distinct: bool = True) -> Tensor:
    ids = unpack_ids(arrays["ids"], count, classes)
    check_ids(ids, classes, distinct)
    return ids


def _log_z(arrays: Mapping[str, Tensor], classes: int) -> Tensor | None:
    if "log_z" not in arrays:
        return None
    log_z = arrays["log_z"].float()
    check_log_z(log_z, classes)
    return log_z


def _encode_varopt(codec: VarOpt, said: Said) -> dict[str, Tensor]:
    p = torch.softmax(said.logprobs.double(), dim=1)  # in double: with float32 sums one row in a thousand has k ± 1
    top, heads_at = p.topk(codec.k, dim=1)
    slots = torch.arange(codec.k, device=p.device)
    before = torch.nn.functional.pad(top.cumsum(dim=1), (1, 0))[:, :-1]
    tau_at = (1 - before) / (codec.k - slots)  # were the ``slot`` likeliest kept as they are
    heads = ((top <= tau_at) | (slots == codec.k - 1)).int().argmax(dim=1, keepdim=True)
    exact = (p > 0).sum(dim=1, keepdim=True) <= codec.k
    heads = torch.where(exact, codec.k, heads)
    mass = (1 - torch.where(slots < heads, top, 0.0).sum(dim=1, keepdim=True)).clamp(min=0)
    # Systematic sampling: the tail's probabilities laid end to end, and every m-th part of their length taken.
    tail = p.scatter(1, heads_at, torch.where(slots < heads, 0.0, top))
    length = tail.cumsum(dim=1)
    count = (codec.k - heads).clamp(min=1)
    start = _uniforms(codec, said, 1)
    marks = (start + (slots - heads).clamp(min=0)) / count * length[:, -1:]
    drawn = torch.searchsorted(length, marks, right=True).clamp(max=p.shape[1] - 1)
    ids = torch.where(slots < heads, heads_at, drawn)
    kept = said.logprobs.gather(1, ids).masked_fill(slots >= heads, -math.inf)
    return {
        "ids": pack_ids(ids, codec.classes),
        **dict(zip(("codes", "range"), to_codes(kept), strict=True)),
        "residual": torch.where(exact, 0.0, mass)[:, 0].log().clamp(min=LOWEST).half(),
    }


def _decode_varopt(codec: VarOpt, arrays: Mapping[str, Tensor]) -> Targets:
    mass = _residual(arrays)
    drawn = arrays["codes"] == 0
    check_rest(mass, drawn.any(dim=1))
    heads = normalised(from_codes(arrays["codes"], arrays["range"]), mass, 8)
    each = (mass / drawn.sum(dim=1).clamp(min=1)).log()[:, None]
    logs = torch.where(drawn, each, heads)
    return Targets(
        logs, kind="unbiased", ids=_ids(arrays, codec.k, codec.classes, distinct=False), classes=codec.classes
    )


def _encode_members(codec: Members, said: Said) -> dict[str, Tensor]:
    if isinstance(codec.inner, Dense):
        found: list[dict[str, Tensor]] = [_encode_dense(codec.inner, m) for m in said.members]
        arrays: dict[str, Tensor] = {}
    else:
        kept = _likeliest(said, codec.inner.k)
        found = [_encode_kept(codec.inner, m, kept) for m in said.members]
        arrays = {"ids": pack_ids(kept, codec.inner.classes)}
    for member, part in zip(codec.members, found, strict=True):
        arrays |= {f"{member}/{name}": value for name, value in part.items()}
    return arrays


def _decode_members(codec: Members, arrays: Mapping[str, Tensor], mixture: Mixture) -> Targets:
    shares = [share for _, share in mixture.shares]
    inner = codec.inner
    if isinstance(inner, Dense):
        logprobs = combine(_members_logprobs(codec, arrays, mixture), shares, mixture.combine)
        if mixture.temperature != 1:
            logprobs = torch.log_softmax(logprobs / mixture.temperature, dim=1)
        return Targets(logprobs, classes=inner.classes)
    assert mixture.linear, "a topk of members is mixed linearly only"
    parts = [_part(arrays, name) for name, _ in mixture.shares]
    log_z = [_log_z(part, inner.classes) for part in parts]
    kept = [_decode_kept(inner, part) for part in parts]
    logprobs, residual = mix_kept([k[0] for k in kept], [k[1] for k in kept], shares)
    return Targets(
        logprobs, kind="ghost", ids=_ids(arrays, inner.k, inner.classes), residual=residual,
        log_z=log_z[0] if len(parts) == 1 else None, temperatures=inner.temperatures,
        classes=inner.classes,
    )  # fmt: skip


def _members_logprobs(codec: Members, arrays: Mapping[str, Tensor], mixture: Mixture) -> list[Tensor]:
    """Log-probabilities [B, C] of the mixture's members before they are averaged, where all classes were kept."""
    assert isinstance(codec.inner, Dense)
    tempered, found = dict(mixture.tempered), []
    for name, _ in mixture.shares:
        logprobs = _decode_dense(codec.inner, _part(arrays, name))
        temperature = tempered.get(name, 1.0)
        found.append(logprobs if temperature == 1 else torch.log_softmax(logprobs / temperature, dim=1))
    return found


def mix_kept(
    logprobs_MBK: Sequence[Tensor], residual_MB: Sequence[Tensor], shares: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The arithmetic mixture of members on one kept set: log-probabilities [B, K] and residual [B]; exact there."""
    weights = torch.tensor(shares, device=logprobs_MBK[0].device, dtype=torch.float32)
    weights = weights / weights.sum()
    stacked = torch.stack(list(logprobs_MBK)) + weights.log()[:, None, None]
    return torch.logsumexp(stacked, dim=0), (torch.stack(list(residual_MB)) * weights[:, None]).sum(dim=0)


def _part(arrays: Mapping[str, Tensor], member: str) -> dict[str, Tensor]:
    prefix = f"{member}/"
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _cumulative(logprobs_BC: Tensor) -> Tensor:
    total = torch.softmax(logprobs_BC.double(), dim=1).cumsum(dim=1)
    return total / total[:, -1:]


def _uniforms(codec: Any, said: Said, count: int) -> Tensor:
    """float64 [B, count] in [0, 1), a function of the codec's seed, each row's key and the view alone."""
    drawn = uniforms(said.keys, codec.seed, said.view, count)
    return torch.from_numpy(drawn).to(said.logprobs.device)
