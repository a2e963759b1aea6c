"""Codecs and projections of features: what they declare is what they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ensemble_distill.cache.groups import Group
from ensemble_distill.codec import Features
from ensemble_distill.codecs.features import decode, encode
from ensemble_distill.errors import InvalidOutput
from ensemble_distill.fingerprint import canonical_json
from ensemble_distill.formats import encode as to_shard
from ensemble_distill.formats.layout import read_segments
from ensemble_distill.projection import Projector, distortion, matrix
from ensemble_distill.reduction import Random, Take

SIGNS = [0, 0, -1, -1, 0, 0, -1, 0, 1, 0, 0, 0, 0, -1, -1, 0, 0, 0, 0, 1]
NORMALS = [0.43348556756973267, 1.6333825588226318, -0.43006354570388794, -0.4412265121936798]
SHAPES = st.sampled_from([(1,), (7,), (3, 4), (3, 2, 5), (2, 3, 2, 2)])


def drawn(shape: tuple[int, ...], seed: int, size: float) -> torch.Tensor:
    """Rows whose channels differ in size by orders of magnitude, with a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, *shape, generator=generator) * size
    x = x * 10 ** (4 * torch.rand(5, *shape[:1], *[1] * (len(shape) - 1), generator=generator) - 2)
    return x.index_fill(0, torch.tensor([2]), 0.0)


# Codecs ---------------------------------------------------------------------------------------------


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-6, 1e-2, 1.0, 300.0]))
def test_16_bit_values_are_as_near_as_declared(shape: tuple[int, ...], seed: int, size: float) -> None:
    x = drawn(shape, seed, size).clamp(-65504, 65504)
    for values, relative, absolute in (("fp16", 2.0**-11, 2.0**-25), ("bf16", 2.0**-8, 0.0)):
        codec = Features.of(shape, values)
        arrays = encode(codec, x)
        assert {n: tuple(a.shape[1:]) for n, a in arrays.items()} == {n: s for n, (_, s) in codec.arrays().items()}
        found = decode(codec, arrays)
        assert found.shape == x.shape and found.dtype == torch.float32
        assert ((found - x).abs() <= relative * x.abs() + absolute).all()


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-8, 1e-3, 1.0, 1e6]), st.integers(0, 3))
def test_8_bit_values_are_off_by_half_a_scale_at_most(
    shape: tuple[int, ...], seed: int, size: float, axis: int
) -> None:
    axis %= len(shape)
    x, codec = drawn(shape, seed, size).clamp(-8e6, 8e6), Features.of(shape, "int8", axis)
    arrays = encode(codec, x)
    scale = arrays["scale"].double()
    assert tuple(scale.shape) == ((5,) if len(shape) == 1 else (5, shape[axis]))
    assert int(arrays["codes"].abs().max()) <= 127 and bool((scale >= 0).all())
    # an oracle: each channel by itself, in float64
    for row in range(5):
        for channel in range(1 if len(shape) == 1 else shape[axis]):
            part = x[row] if len(shape) == 1 else x[row].select(axis, channel)
            whole = decode(codec, arrays)[row]
            kept = whole if len(shape) == 1 else whole.select(axis, channel)
            s = float(scale[row] if len(shape) == 1 else scale[row, channel])
            largest = float(part.double().abs().max())
            assert largest / 127 <= s <= largest / 127 * (1 + 2**-10) + 2**-24
            assert float((kept.double() - part.double()).abs().max()) <= s / 2 * (1 + 1e-5)


def test_what_a_codec_would_make_infinite_is_refused_by_name() -> None:
    for values, bad in (("fp16", 7e4), ("fp16", torch.nan), ("bf16", torch.inf), ("int8", 9e6), ("int8", torch.nan)):
        for shape in ((8,), (2, 3)):
            x = torch.zeros(2, *shape)
            x.view(2, -1)[1, 3] = bad
            with pytest.raises(InvalidOutput, match=r"tap/a\.x is not finite"):
                encode(Features.of(shape, values), x, "tap/a.x")
    with pytest.raises(InvalidOutput) as error:
        encode(Features.of((8,)), torch.full((1, 8), 7e4))
    assert "bf16" in error.value.hint
    large = torch.full((1, 8), 7e4)
    torch.testing.assert_close(decode(Features.of((8,), "bf16"), encode(Features.of((8,), "bf16"), large)), large,
                               rtol=2**-8, atol=0)  # fmt: skip


@pytest.mark.parametrize("format", ["hdf5", "parquet"])
@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
def test_features_of_several_axes_come_back_from_a_shard(format: str, values: str) -> None:
    codec, x = Features.of((3, 2, 5), values), drawn((3, 2, 5), 1, 1.0)
    group = Group.of("tap.a.x", {"tap/a.x": codec})
    arrays, records = encode(codec, x), np.zeros(5, group.dtype)
    for name, array in arrays.items():
        records[f"tap/a.x/{name}" if name else "tap/a.x"] = array.numpy()
    parts, segments = to_shard(format, records)
    read = read_segments(np.frombuffer(b"".join(map(bytes, parts)), np.uint8), 5, group.dtype, segments)
    held = {n: torch.from_numpy(read[f"tap/a.x/{n}" if n else "tap/a.x"].copy()) for n in arrays}
    assert torch.equal(decode(codec, held), decode(codec, arrays))


def test_a_plan_from_before_there_were_shapes_is_what_it_was() -> None:
    old = {"name": "features", "width": 48}
    assert Features.of((48,)).model_dump(mode="json") == old and Features.model_validate(old) == Features.of((48,))
    take = Take(module="x", reduction="attention")
    new = Features.of((4, 6), "int8", 1, take=take, project=Random(dim=3))
    assert Features.model_validate_json(canonical_json(new.model_dump(mode="json"))) == new


@pytest.mark.parametrize(
    "fields",
    [{}, {"width": 2, "shape": (1, 2)}, {"shape": (4,)}, {"shape": (2, 0)}, {"shape": (1 << 14, 1 << 14)},
     {"shape": (2, 2), "axis": 2}, {"width": 2, "axis": 1}, {"width": 2, "values": "fp8"}],
)  # fmt: skip
def test_sizes_that_are_none_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Features(**fields)


# Projections ----------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.sampled_from(["sparse", "gaussian"]), st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 40))
def test_a_matrix_is_a_function_of_its_size_and_seed(kind: str, seed: int, width: int, dim: int) -> None:
    one, two = (matrix(Random(dim=dim, seed=seed, kind=kind), width) for _ in range(2))
    assert one.shape == (width, dim) and one.dtype == np.float32 and np.array_equal(one, two)
    other = matrix(Random(dim=dim, seed=(seed + 1) % 2**32, kind=kind), width)
    if width * dim > 60:
        assert not np.array_equal(one, other)


def test_entries_have_the_declared_distribution() -> None:
    sparse = matrix(Random(dim=200, seed=3), 2000).astype(np.float64)
    values, counts = np.unique(np.abs(sparse), return_counts=True)
    np.testing.assert_allclose(values, [0, np.sqrt(3 / 200)], rtol=1e-6)
    np.testing.assert_allclose(counts / sparse.size, [2 / 3, 1 / 3], atol=3e-3)
    assert abs(sparse.mean()) < 3e-4
    gaussian = matrix(Random(dim=200, seed=3, kind="gaussian"), 2000).astype(np.float64) * np.sqrt(200)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((gaussian**power).mean() - moment) < 0.05
    columns = np.corrcoef(sparse.T)
    assert np.abs(columns - np.eye(200)).max() < 0.15


def test_a_matrix_is_the_same_whatever_block_it_is_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {kind: matrix(Random(dim=7, seed=9, kind=kind), 31) for kind in ("sparse", "gaussian")}
    monkeypatch.setattr("ensemble_distill.projection._BLOCK", 20)
    for kind, expected in whole.items():
        assert np.array_equal(matrix(Random(dim=7, seed=9, kind=kind), 31), expected)


def test_the_first_entries_are_golden() -> None:
    """What stands in caches is made of them, so they must never change."""
    signs = np.sign(matrix(Random(dim=4, seed=1), 5)).astype(int).ravel().tolist()
    assert signs == SIGNS
    np.testing.assert_allclose(matrix(Random(dim=2, seed=1, kind="gaussian"), 2).ravel(), NORMALS, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sparse", "gaussian"])
def test_projections_keep_distances_the_better_the_more_there_are(kind: str) -> None:
    x = torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    errors = [distortion(x, Projector()(Random(dim=dim, kind=kind), x)) for dim in (16, 256)]
    # the relative error of a squared distance has the deviation √(2/dim), its mean size is √(2/π) of that
    for dim, error in zip((16, 256), errors, strict=True):
        assert error == pytest.approx((2 / dim) ** 0.5 * (2 / np.pi) ** 0.5, rel=0.2)


def test_distortion_is_that_of_an_oracle() -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 2)
    pairs = [(i, j) for i in range(6) for j in range(i)]
    squares = [[float(((z[i] - z[j]).double() ** 2).sum()) for i, j in pairs] for z in (x, y)]
    expected = np.mean([abs(b - a) / a for a, b in zip(*squares, strict=True)])
    assert distortion(x, y) == pytest.approx(expected)
    assert distortion(x, x) == 0 and distortion(x[:1], y[:1]) is None and distortion(x * 0, y) is None


def test_a_projection_that_takes_more_than_a_gib_is_refused() -> None:
    with pytest.raises(ValueError, match=r"300000 to 1024 values takes 1\.2 GB"):
        matrix(Random(dim=1024), 300_000)
