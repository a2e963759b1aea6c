"""Codecs: what comes back of what members said, held against float64, and the bytes that it takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble_distill.codec import (
    TEMPERATURES,
    Dense,
    Features,
    HeadCodec,
    Members,
    RowFigures,
    Sampled,
    TopK,
    VarOpt,
    id_bits,
    resolved,
)
from ensemble_distill.codecs import features
from ensemble_distill.codecs.domain import BadRow
from ensemble_distill.codecs.heads import decode, encode, encode_figures, with_figures
from ensemble_distill.codecs.packing import from_codes, pack_ids, to_codes, unpack_ids
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import soft_targets
from ensemble_distill.mixture import Mixture, combine
from ensemble_distill.targets import Said, Targets

GOLDEN = Path(__file__).parent / "golden" / "codecs.json"


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def said(logprobs: Tensor, members: list[Tensor] | None = None, seed: int = 0, view: int = 0, **more: Any) -> Said:
    members = members or [logprobs]
    return Said(logprobs, members, [1.0] * len(members), more.get("labels"), keys(len(logprobs), seed), view)


def drawn(rows: int, classes: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    """Log-probabilities of a made-up ensemble, float32 [rows, classes]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(rows, classes, generator=generator) * scale, 1)


def round_trip(codec: HeadCodec, what: Said, mixture: Mixture | None = None) -> Targets:
    """Through the arrays as a shard holds them; their dtypes and shapes are those that the codec declares."""
    codec = resolved(codec, what.logprobs.shape[1], tuple("abcdefgh"[: len(what.members)]))
    arrays = {name: array.numpy() for name, array in encode(codec, what).items()}
    found = {name: (array.dtype.newbyteorder("<").str, array.shape[1:]) for name, array in arrays.items()}
    assert found == codec.arrays()
    return decode(codec, {name: torch.from_numpy(array) for name, array in arrays.items()}, mixture)


def full(targets: Targets) -> Tensor:
    """The probabilities [B, C] that sparse targets name, 0 elsewhere."""
    dense = torch.zeros(len(targets), targets.classes, dtype=torch.float64)
    return dense.scatter_add(1, targets.ids, targets.logprobs.double().exp())


# Bits -----------------------------------------------------------------------------------------------


@given(st.sampled_from([2, 3, 10, 127, 128, 129, 1000, 65_535, 65_536, 65_537, 128_256, 1 << 20]), st.data())
def test_ids_come_back_at_any_number_of_bits(classes: int, data: st.DataObject) -> None:
    count, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 999))
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, (5, count)))
    ids[0, 0], ids[0, -1] = 0, classes - 1
    packed = pack_ids(ids, classes)
    assert packed.dtype == torch.uint8 and packed.shape[1] == math.ceil(count * id_bits(classes) / 8)
    assert torch.equal(unpack_ids(packed, count, classes), ids)
    assert int(unpack_ids(torch.full_like(packed, 255), count, classes).min()) == (1 << id_bits(classes)) - 1


def test_ids_lie_lowest_bit_first() -> None:
    assert pack_ids(torch.tensor([[1, 2, 3]]), 8).tolist() == [[0b11_010_001, 0b0]]
    assert [id_bits(c) for c in (2, 3, 4, 5, 1000, 65_536, 65_537)] == [1, 2, 2, 3, 10, 16, 17]


@given(st.integers(2, 200), st.floats(0.1, 12), st.integers(0, 10**6))
def test_codes_are_off_by_half_a_step_at_most(count: int, scale: float, seed: int) -> None:
    logprobs = drawn(4, count, scale, seed)
    codes, ends = to_codes(logprobs)
    low, high = ends[:, :1].float(), ends[:, 1:].float()
    step = (high - low) / 254
    inside = logprobs >= low
    error = (from_codes(codes, ends) - logprobs).abs()
    rounding = logprobs.abs() * 2**-10 + 1e-6  # of the range's ends in float16
    assert bool((error <= step / 2 + rounding)[inside].all())
    assert bool((high - low <= 20.05).all())


def test_codes_keep_impossibilities_and_rows_of_one_value() -> None:
    logprobs = torch.tensor([[0.0, -math.inf, -math.inf], [-math.log(3)] * 3, [-math.inf] * 3])
    decoded = from_codes(*to_codes(logprobs))
    torch.testing.assert_close(decoded, logprobs, atol=1e-3, rtol=0)


# Dense ----------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(2, 50), st.integers(0, 2**31))
def test_dense_round_trips_within_its_declared_error(b: int, c: int, seed: int) -> None:
    logprobs = drawn(b, c, 10, seed)
    stored = encode(Dense(classes=c), said(logprobs))["logprobs"]
    torch.testing.assert_close(stored.float(), logprobs, rtol=2**-11, atol=1e-7)
    targets = round_trip(Dense(), said(logprobs))
    torch.testing.assert_close(targets.logprobs.exp().sum(1), torch.ones(b))
    assert float(kl(logprobs, targets.logprobs).abs().max()) < 2e-6
    assert float(kl(logprobs, round_trip(Dense(bits=8), said(logprobs)).logprobs).max()) < 2e-3


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(1)


@pytest.mark.parametrize("bits", [8, 16])
def test_dense_keeps_certainty_and_impossibility(bits: int) -> None:
    one_hot = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert torch.equal(round_trip(Dense(bits=bits), said(one_hot)).logprobs, one_hot)
    small = torch.log_softmax(torch.tensor([[0.0, -60.0, -1e5]]), 1)
    assert torch.isfinite(round_trip(Dense(bits=bits), said(small)).logprobs).all()


# Top-k ----------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([2, 5, 100, 70_001]), st.floats(0.5, 8), st.sampled_from([8, 16]), st.integers(0, 999))
def test_topk_keeps_the_likeliest_and_what_is_left(classes: int, scale: float, values: int, seed: int) -> None:
    logprobs = drawn(3, classes, scale, seed)
    k = min(classes, 16)
    targets = round_trip(TopK(k=k, values=values), said(logprobs))
    best = logprobs.topk(k, dim=1)
    assert torch.equal(targets.ids, best.indices) and torch.equal(targets.top1(), logprobs.argmax(1))
    kept = best.values.double().exp().sum(1)
    assert bool((targets.residual >= 0).all())
    torch.testing.assert_close(targets.residual.double(), (1 - kept).clamp(min=0), atol=1e-6, rtol=5e-3)
    torch.testing.assert_close(targets.logprobs.exp().sum(1) + targets.residual, torch.ones(3))
    span = best.values[:, 0] - best.values[:, -1]
    bound = (span.clamp(max=20) / 508 if values == 8 else 0) + 0.02 + best.values.abs().amax(1) * 2**-9
    inside = best.values >= best.values[:, :1] - 20
    assert bool(((targets.logprobs - best.values).abs() <= bound[:, None])[inside].all())


def test_topk_of_all_classes_of_one_hot_and_of_uniform_rows() -> None:
    everything = round_trip(TopK(k=5), said(drawn(4, 5)))
    assert torch.equal(everything.residual, torch.zeros(4))
    one_hot = torch.full((1, 9), -math.inf)
    one_hot[0, 7] = 0
    targets = round_trip(TopK(k=3), said(one_hot))
    assert targets.top1().tolist() == [7] and float(targets.logprobs[0, 0]) == 0 and float(targets.residual) == 0
    uniform = torch.full((1, 100), -math.log(100))
    targets = round_trip(TopK(k=10), said(uniform))
    torch.testing.assert_close(targets.residual, torch.tensor([0.9]), atol=1e-4, rtol=0)
    torch.testing.assert_close(targets.logprobs.exp(), torch.full((1, 10), 0.01), atol=1e-5, rtol=0)


def test_a_residual_is_exact_where_a_float32_sum_would_not_be() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 3] = 25.0
    logprobs = torch.log_softmax(logits.double(), 1).float()
    exact = 998 * math.exp(-25) / (1 + 999 * math.exp(-25))
    assert float(round_trip(TopK(k=2), said(logprobs)).residual) == pytest.approx(exact, rel=0.01)


@settings(max_examples=30)
@given(st.floats(1.0, 8.0) | st.sampled_from(TEMPERATURES), st.integers(0, 99), st.floats(0.5, 6))
def test_kept_classes_are_tempered_with_the_normaliser_of_all(temperature: float, seed: int, scale: float) -> None:
    logprobs = drawn(4, 500, scale, seed)
    exact = torch.log_softmax(logprobs.double() / temperature, 1)
    targets = round_trip(TopK(k=20, values=16), said(logprobs)).at(temperature)
    kept = exact.gather(1, targets.ids)
    tail = 1 - kept.exp().sum(1)
    # total variation of the kept classes and the tail's mass
    off = 0.5 * ((targets.logprobs.double().exp() - kept.exp()).abs().sum(1) + (targets.residual - tail).abs())
    assert float(off.max()) < (3e-3 if temperature in TEMPERATURES else 1.5e-2)
    torch.testing.assert_close(targets.logprobs.exp().sum(1) + targets.residual, torch.ones(4), atol=1e-6, rtol=0)


def test_temperatures_outside_of_the_grid_and_of_samples_are_refused() -> None:
    what = said(drawn(2, 50))
    with pytest.raises(UsageError, match="between 1 and 8"):
        round_trip(TopK(k=5), what).at(20)
    with pytest.raises(UsageError, match="at 1 only"):
        round_trip(TopK(k=5, temperatures=()), what).at(2)
    for codec in (VarOpt(k=5), Sampled(n=5)):
        with pytest.raises(UsageError, match="cannot be tempered"):
            round_trip(codec, what).at(2)
        assert round_trip(codec, what).at(1).kind == "unbiased"


# Samples --------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.sampled_from([5, 64, 4097]), st.floats(0.2, 8), st.integers(1, 24), st.integers(0, 999))
def test_varopt_keeps_exactly_k_classes_of_total_weight_one(classes: int, scale: float, k: int, seed: int) -> None:
    k = min(k, classes)
    logprobs = drawn(16, classes, scale, seed)
    targets = round_trip(VarOpt(k=k), said(logprobs, seed=seed))
    weights = targets.logprobs.double().exp()
    assert targets.ids.shape == (16, k)
    assert all(len(set(row)) == k for row in targets.ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(16, dtype=torch.float64), atol=1e-5, rtol=0)
    # what is likelier than the drawn weight is there, about as it is; what was drawn has one weight
    p, tau = logprobs.double().exp(), weights.amin(1)
    for row in range(16):
        sure = ((p[row] > 1.1 * tau[row]) & (p[row] > p[row].max() * math.exp(-19))).nonzero()[:, 0].tolist()
        kept = dict(zip(targets.ids[row].tolist(), weights[row].tolist(), strict=True))
        assert all(kept[c] == pytest.approx(float(p[row, c]), rel=0.07) for c in sure)


@pytest.mark.parametrize("codec", [VarOpt(k=6), Sampled(n=12)])
def test_samples_are_unbiased(codec: HeadCodec) -> None:
    """The mean over 40,000 draws is the distribution, within five standard errors of each class."""
    logprobs = drawn(1, 40, 2.0, seed=3)
    targets = round_trip(codec, said(logprobs.expand(40_000, -1), seed=5))
    weights = full(targets)
    mean, error = weights.mean(0), weights.std(0) / 200
    bias = 0.011 if isinstance(codec, VarOpt) else 0  # likely classes are rounded to half a step
    assert bool(((mean - logprobs[0].double().exp()).abs() <= 5 * error + bias * mean + 1e-6).all())


def test_varopt_varies_less_than_a_sample_of_as_many_draws() -> None:
    logprobs = drawn(1, 200, 2.0, seed=1).expand(5000, -1)
    variances = [float(full(round_trip(codec, said(logprobs))).var(0).sum()) for codec in (VarOpt(k=12), Sampled(n=12))]
    assert variances[0] < variances[1] / 2


def test_varopt_keeps_rows_of_few_possible_classes_exactly() -> None:
    logprobs = torch.full((2, 50), -math.inf)
    logprobs[0, [3, 40]] = torch.tensor([0.25, 0.75]).log()
    logprobs[1, 9] = 0
    weights = full(round_trip(VarOpt(k=4), said(logprobs)))
    torch.testing.assert_close(weights, logprobs.double().exp(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("codec", [VarOpt(k=4), Sampled(n=4)])
def test_a_draw_is_a_function_of_seed_key_and_view(codec: VarOpt | Sampled) -> None:
    logprobs = drawn(64, 1000, 1.0)
    once = round_trip(codec, said(logprobs)).ids
    assert torch.equal(once, round_trip(codec, said(logprobs)).ids)
    part = Said(logprobs[8:16], [logprobs[8:16]], [1.0], None, keys(64)[8:16], 0)
    assert torch.equal(once[8:16], round_trip(codec, part).ids), "and not of the batch"
    for other in (said(logprobs, seed=1), said(logprobs, view=1)):
        assert not torch.equal(once, round_trip(codec, other).ids)
    assert not torch.equal(once, round_trip(codec.model_copy(update={"seed": 1}), said(logprobs)).ids)


# Members --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean_probs", "mean_logits"])
def test_members_can_be_combined_after_the_capture(rule: str) -> None:
    members = [drawn(8, 30, 3, seed) for seed in range(3)]
    what = said(combine(members, [1, 1, 1], "mean_probs"), members)
    for shares in ([1.0, 1.0, 1.0], [0.2, 0.7, 0.1], [1.0]):
        mixture = Mixture(tuple(zip("abc", shares, strict=False)), rule)
        found = round_trip(Members(), what, mixture).logprobs
        expected = combine(members[: len(shares)], shares, rule)
        assert float(kl(expected, found).abs().max()) < 1e-5


def test_a_mixture_of_kept_members_is_exact_on_what_was_kept() -> None:
    members = [drawn(8, 300, 3, seed) for seed in range(3)]
    what = said(combine(members, [1, 1, 1], "mean_probs"), members)
    mixture = Mixture((("a", 0.5), ("c", 0.5)), "mean_probs")
    targets = round_trip(Members(inner=TopK(k=20, values=16)), what, mixture)
    exact = combine([members[0], members[2]], [1, 1], "mean_probs").double().exp()
    torch.testing.assert_close(targets.logprobs.double().exp(), exact.gather(1, targets.ids), atol=1e-3, rtol=2e-2)
    torch.testing.assert_close(targets.residual.double(), 1 - exact.gather(1, targets.ids).sum(1), atol=2e-3, rtol=2e-2)
    with pytest.raises(UsageError, match="at 1 only"):
        targets.at(2)  # the normaliser of a mixture does not follow from its members'
    one = round_trip(Members(inner=TopK(k=20)), what, Mixture((("b", 1.0),), "mean_probs"))
    assert one.at(2).kind == "ghost"


def test_copies_of_one_member_are_that_member() -> None:
    logprobs = drawn(5, 20)
    mixture = Mixture((("a", 3.0), ("b", 1.0), ("c", 2.0)), "mean_probs")
    found = round_trip(Members(), said(logprobs, [logprobs] * 3), mixture)
    torch.testing.assert_close(found.logprobs, round_trip(Dense(), said(logprobs)).logprobs, atol=1e-6, rtol=0)


# Figures of a row, and features ---------------------------------------------------------------------


def test_the_figures_of_a_row_are_entropy_mutual_information_and_the_labels_log_probability() -> None:
    members = [drawn(6, 10, 3, seed) for seed in range(4)]
    shares = np.array([1.0, 2.0, 1.0, 1.0])
    labels = torch.arange(6)
    what = replace(said(combine(members, list(shares), "mean_probs"), members, labels=labels), shares=list(shares))
    found = with_figures(Targets(what.logprobs, classes=10), encode_figures(what))
    p = np.stack([m.double().exp().numpy() for m in members])
    mixed = np.einsum("m,mbc->bc", shares / shares.sum(), p)
    h = lambda q: -(q * np.log(q)).sum(-1)  # noqa: E731
    np.testing.assert_allclose(found.entropy, h(mixed), rtol=2e-3)
    np.testing.assert_allclose(found.mutual_information, h(mixed) - (shares / 5) @ h(p), rtol=5e-3, atol=1e-4)
    np.testing.assert_allclose(found.label_logprob, np.log(mixed[np.arange(6), np.arange(6)]), rtol=2e-3)
    alone = encode_figures(said(members[0]))
    assert torch.isnan(alone["label_logprob"]).all() and float(alone["mutual_information"].abs().max()) < 1e-5
    impossible = torch.tensor([[0.0, -math.inf]])
    assert float(encode_figures(said(impossible, labels=torch.tensor([1])))["label_logprob"]) == -65504
    assert {n: (str(a.dtype), a.ndim) for n, a in alone.items()} == dict.fromkeys(
        RowFigures().arrays(), ("torch.float16", 1)
    )


# Parameters and bytes -------------------------------------------------------------------------------


def test_more_classes_than_there_are_cannot_be_kept() -> None:
    for codec in (TopK(k=11), VarOpt(k=11), Members(inner=TopK(k=11))):
        with pytest.raises(ValueError, match="k=11 of 10 classes"):
            resolved(codec, 10, ("a",))
    assert resolved(TopK(k=10), 10, ()).classes == 10


ROWS = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125, 1e-9], [0.998, 0.0005, 0.0005, 0.0005, 0.0005]]))
CASES: dict[str, HeadCodec] = {
    "dense": Dense(), "dense 8": Dense(bits=8), "topk": TopK(k=2), "topk 16": TopK(k=2, values=16),
    "varopt": VarOpt(k=3), "sampled": Sampled(n=6), "members": Members(), "members topk": Members(inner=TopK(k=2)),
}  # fmt: skip


def golden_bytes() -> dict[str, dict[str, str]]:
    found = {}
    for name, codec in CASES.items():
        whole = resolved(codec, 5, ("a", "b"))
        arrays = encode(whole, said(ROWS, [ROWS, ROWS.flip(1)]))
        found[name] = {n: array.numpy().tobytes().hex() for n, array in sorted(arrays.items())}
    found["row"] = {n: a.numpy().tobytes().hex() for n, a in encode_figures(said(ROWS, [ROWS, ROWS.flip(1)])).items()}
    row, map_B = torch.tensor([[1.0, -2.5, 3e-5]]), torch.tensor([[[1.0, -2.5], [0.0, 3e-5]]])
    for name, x in (("fp16", row), ("bf16", row), ("int8", row), ("int8", map_B)):
        codec = Features.of(tuple(x.shape[1:]), name)
        called = {"fp16": "features", "int8": f"features int8 {x.ndim - 1}d"}.get(name, f"features {name}")
        found[called] = {n: array.numpy().tobytes().hex() for n, array in features.encode(codec, x).items()}
    return found


def test_the_bytes_of_each_codec_are_golden() -> None:
    assert golden_bytes() == json.loads(GOLDEN.read_text())


def test_bytes_of_a_row_are_what_the_documentation_says() -> None:
    def size(codec: HeadCodec, classes: int) -> int:
        arrays = resolved(codec, classes, ("a", "b")).arrays().values()
        return sum(np.dtype(d).itemsize * math.prod(s) for d, s in arrays)

    assert size(Dense(), 1000) == 2000 and size(Dense(bits=8), 1000) == 1004
    assert size(TopK(k=64), 128_256) == 136 + 64 + 4 + 2 + 16
    assert size(VarOpt(k=12), 128_256) == 26 + 12 + 4 + 2
    assert size(Sampled(n=50), 128_256) == 107
    assert size(Members(), 1000) == 4000


# Rows that no codec writes ------------------------------------------------------------------------------

ALL_CODECS = [
    Dense(),
    Dense(bits=8),
    TopK(k=4),
    TopK(k=4, values=16),
    VarOpt(k=4),
    Sampled(n=4),
    Members(),
    Members(inner=TopK(k=4)),
]


def encoded_rows(codec: HeadCodec, rows: int = 6, classes: int = 10) -> tuple[HeadCodec, dict[str, Tensor]]:
    members = [drawn(rows, classes, seed=seed) for seed in (1, 2)]
    codec = resolved(codec, classes, ("a", "b"))
    return codec, encode(codec, said(combine(members, [1.0, 1.0], "mean_probs"), members))


MIXED = Mixture((("a", 1.0), ("b", 1.0)), "mean_probs")
WRONG = {
    "logprobs": [math.nan, math.inf],
    "residual": [math.nan, math.inf, 0.5],
    "log_z": [math.nan, math.inf, -1.0, 5.0],
    "range": [math.nan, math.inf, -math.inf],
    "ids": [255],
}
FORGED = [
    (codec, name, value)
    for codec in ALL_CODECS
    for name in encoded_rows(codec)[1]
    for value in WRONG.get(name.rpartition("/")[2], [])
]


@pytest.mark.parametrize(("codec", "name", "value"), FORGED)
def test_a_row_that_no_codec_writes_is_refused_and_named(codec: HeadCodec, name: str, value: float) -> None:
    codec, arrays = encoded_rows(codec)
    decode(codec, arrays, MIXED)
    arrays[name][4:].reshape(2, -1)[:, 0] = value
    with pytest.raises(BadRow) as error:
        decode(codec, arrays, MIXED)
    assert error.value.row == 4 and error.value.exit_code == 4


@pytest.mark.parametrize("codec", [TopK(k=4), Members(inner=TopK(k=4))])
def test_a_class_that_was_kept_twice_is_refused(codec: HeadCodec) -> None:
    codec, arrays = encoded_rows(codec)
    arrays["ids"][5] = 0
    with pytest.raises(BadRow, match="row 5 of a batch: a class that was kept twice"):
        decode(codec, arrays, MIXED)


@pytest.mark.parametrize("codec", [Dense(bits=8), TopK(k=4), VarOpt(k=4)])
def test_a_range_the_wrong_way_round_is_refused(codec: HeadCodec) -> None:
    codec, arrays = encoded_rows(codec)
    arrays["range"][:] = arrays["range"].flip(1)
    with pytest.raises(BadRow, match="a range of log-probabilities that is none"):
        decode(codec, arrays, MIXED)


def test_a_dense_row_without_a_possible_class_is_refused() -> None:
    for bits, name, value in ((16, "logprobs", -math.inf), (8, "codes", 0)):
        codec, arrays = encoded_rows(Dense(bits=bits))
        arrays[name][2] = value
        with pytest.raises(BadRow, match="row 2 of a batch: no distribution"):
            decode(codec, arrays)


@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("codec", ALL_CODECS)
def test_whatever_a_codec_writes_it_decodes(codec: HeadCodec, scale: float, classes: int) -> None:
    k = {"k": min(4, classes)}
    if isinstance(codec, (TopK, VarOpt)):
        codec = codec.model_copy(update=k)
    if isinstance(codec, Members) and isinstance(codec.inner, TopK):
        codec = Members(inner=codec.inner.model_copy(update=k))
    members = [drawn(64, classes, scale, seed) for seed in (1, 2)]
    members[0][:8] = -math.inf
    members[0][:8, 1] = 0.0  # certain, and of the other member's likeliest classes it has none
    codec = resolved(codec, classes, ("a", "b"))
    what = said(combine(members, [1.0, 1.0], "mean_probs"), members, labels=torch.zeros(64, dtype=torch.long))
    targets = decode(codec, encode(codec, what), MIXED)
    if codec.name != "sampled":
        with_figures(targets, encode_figures(what))


KEPT: list[HeadCodec] = [TopK(k=4), TopK(k=4, values=16), TopK(k=10), VarOpt(k=4), Members(inner=TopK(k=4))]


@pytest.mark.parametrize("codec", KEPT)
@pytest.mark.parametrize("left", [0.3, 0.0, None])
def test_a_row_without_its_mass_is_refused(codec: HeadCodec, left: float | None) -> None:
    """All of the kept is gone and a rest stays, or none; or the rest is another one."""
    codec, arrays = encoded_rows(codec)
    for name, array in arrays.items():
        kind = name.rpartition("/")[2]
        if kind == "residual":
            array[3] = ((array[3].exp() + 0.5) % 1 if left is None else torch.tensor(left)).log()
        elif kind in ("codes", "logprobs") and left is not None:
            array[3] = 0 if kind == "codes" else -math.inf
    with pytest.raises(BadRow, match=r"row 3 of a batch: (kept classes and a rest that|a rest, and no class)"):
        decode(codec, arrays, MIXED)


def test_a_rest_that_no_class_has_is_refused() -> None:
    """Else a trifle of the mass is of a class that no student has, and the loss is infinite."""
    for codec in (TopK(k=10), VarOpt(k=4)):
        whole, arrays = encoded_rows(codec)
        arrays["residual"][2] = math.log(0.01)
        if isinstance(whole, VarOpt):
            arrays["codes"][2] = 255
            arrays["range"][2] = math.log(0.99 / 4)
        with pytest.raises(BadRow, match="row 2 of a batch: a rest, and no class that has it"):
            decode(whole, arrays)


@settings(max_examples=40)
@given(
    st.sampled_from([2, 3, 10, 40]), st.sampled_from([1, 2, 7, 40]), st.sampled_from([-1e5, 0.0, 80.0]), st.data()
)  # fmt: skip
def test_rows_that_a_codec_writes_have_their_mass(classes: int, k: int, offset: float, data: st.DataObject) -> None:
    """Also those that rounding moves the furthest: logits half of a step of eight bits apart."""
    step = 20 / 254
    logit = st.floats(-60, 0) | st.integers(-508, 0).map(lambda n: n * step / 2) | st.sampled_from([-20.0, -1e4])
    rows = data.draw(st.lists(st.lists(logit, min_size=classes, max_size=classes), min_size=2, max_size=2))
    members = [torch.log_softmax(torch.tensor([row], dtype=torch.float64) + offset, 1).float() for row in rows]
    what = said(combine(members, [1.0, 1.0], "mean_probs"), members)
    for codec in (TopK(k=min(k, classes)), TopK(k=min(k, classes), values=16), VarOpt(k=min(k, classes))):
        round_trip(codec, what)
        if isinstance(codec, TopK):
            round_trip(Members(inner=codec), what, MIXED)


@pytest.mark.parametrize("values", [8, 16])
@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_many_classes_that_are_rounded_alike_have_their_mass(values: int, shift: float) -> None:
    """All but one lie half of a step from the largest, or where float16 is coarsest: as far off as a row can be."""
    for count in (2, 100, 60_000):
        logits = torch.full((1, count + 2), shift * 20 / 254 * 0.99, dtype=torch.float64)
        logits[0, :2] = torch.tensor([0.0, -20.0])
        rows = torch.log_softmax(logits, 1).float()
        round_trip(TopK(k=count + 2, values=values), said(rows))
        round_trip(VarOpt(k=count + 2), said(rows))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("entropy", -50.0), ("entropy", 5.0), ("entropy", math.inf), ("mutual_information", math.inf),
        ("mutual_information", -1.0), ("label_logprob", 1.0), ("label_logprob", -math.inf),
    ],
)  # fmt: skip
def test_figures_out_of_their_range_are_refused_and_unknown_ones_are_not(name: str, value: float) -> None:
    what = said(drawn(6, 10), labels=torch.arange(6))
    figures = encode_figures(what)
    figures["entropy"][0] = math.nan
    with_figures(Targets(what.logprobs, classes=10), figures)
    figures[name][3] = value
    with pytest.raises(BadRow, match=f"row 3 of a batch: {name} out of its range"):
        with_figures(Targets(what.logprobs, classes=10), figures)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_is_refused(value: float) -> None:
    codec = Features(width=3)
    stored = features.encode(codec, torch.zeros(4, 3))
    stored[""][2, 1] = value
    with pytest.raises(BadRow, match="row 2 of a batch: a feature that is not finite"):
        features.decode(codec, stored)


@pytest.mark.parametrize("values", [8, 16])
def test_where_all_classes_are_kept_nothing_is_left_over_at_any_temperature(values: int) -> None:
    """Else the rest, which the student cannot have, has a trifle of the mass and the loss is infinite."""
    what = said(drawn(200, 10))
    targets = round_trip(TopK(k=10, values=values), what).at(2.0)
    assert not targets.residual.any()
    torch.testing.assert_close(targets.logprobs.exp().sum(1), torch.ones(200))
    assert torch.isfinite(soft_targets(torch.randn(200, 10), round_trip(TopK(k=10, values=values), what), 2.0))
