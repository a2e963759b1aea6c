"""Keys, views, orders: pure functions whose values must never change, or every cache would be void."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble_distill.cache.join import KeyTable
from ensemble_distill.errors import Mismatch
from ensemble_distill.fingerprint import array_digest, canonical_json, sample_keys
from ensemble_distill.philox import permutation, philox
from ensemble_distill.sources.views import draw, render
from ensemble_distill.transforms import Crop, Erase, Flip, ViewsConfig


def test_philox_gives_the_published_vectors() -> None:
    """The known answers of Random123's kat_vectors for philox4x32-10."""
    ones = np.full((1, 4), 0xFFFFFFFF, np.uint32)
    pi = np.array([[0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], np.uint32)
    for counter, key, expected in [
        (np.zeros((1, 4), np.uint32), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (ones, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        assert " ".join(f"{word:08x}" for word in philox(counter, key)[0]) == expected


def test_a_key_is_half_a_sha256_over_names_dtypes_shapes_and_bytes() -> None:
    image, length = np.arange(6, dtype=np.uint8).reshape(1, 2, 3), np.array([7], np.int64)
    expected = hashlib.sha256(
        b"image:|u1:(2, 3)\n" + image.tobytes() + b"length:<i8:()\n" + (7).to_bytes(8, "little")
    ).digest()[:16]
    assert sample_keys({"length": length, "image": image})[0].tobytes() == expected


def test_keys_tell_apart_dtype_shape_name_and_content_but_not_order_or_byte_order() -> None:
    x = np.arange(24, dtype=np.int32).reshape(4, 6)
    keys = sample_keys({"x": x})
    assert len(np.unique(keys, axis=0)) == 4
    np.testing.assert_array_equal(sample_keys({"x": x[::-1]}), keys[::-1])
    np.testing.assert_array_equal(sample_keys({"x": x.astype(">i4")}), keys)
    np.testing.assert_array_equal(sample_keys({"x": np.asfortranarray(x)}), keys)
    for other in ({"y": x}, {"x": x.astype(np.int64)}, {"x": x.reshape(4, 2, 3)}, {"x": x, "y": x}):
        assert (sample_keys(other) != keys).any(axis=1).all()


@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_an_order_is_a_permutation_and_a_function_of_its_arguments(size: int, seed: int, epoch: int) -> None:
    order = permutation(size, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(order, permutation(size, seed, epoch))


def test_orders_are_what_they_have_always_been() -> None:
    assert permutation(8, 0, 0).tolist() == [2, 0, 5, 7, 6, 3, 4, 1]
    assert permutation(8, 7, 3).tolist() == [5, 0, 6, 2, 4, 1, 7, 3]


VIEWS = ViewsConfig(transforms=(Flip(), Crop(padding=2), Erase(p=0.5)), seed=5)


def images(n: int = 16) -> tuple[torch.Tensor, np.ndarray]:
    x = np.random.default_rng(0).integers(1, 255, (n, 1, 28, 28), dtype=np.uint8)
    return torch.from_numpy(x), sample_keys({"image": x})


def test_a_view_is_a_function_of_seed_key_and_number_not_of_the_batch() -> None:
    x, keys = images()
    whole = render(x, keys, VIEWS, 3)
    one_by_one = torch.cat([render(x[i : i + 1], keys[i : i + 1], VIEWS, 3) for i in range(len(x))])
    assert torch.equal(whole, one_by_one)
    assert torch.equal(render(x.flip(0), keys[::-1], VIEWS, 3).flip(0), whole)
    assert not torch.equal(render(x, keys, VIEWS, 4), whole)
    assert not torch.equal(render(x, keys, VIEWS.model_copy(update={"seed": 6}), 3), whole)


def test_draws_are_uniform_and_independent_of_their_slots() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (4000, 16), dtype=np.uint8)
    u = draw(keys, 1, 2, 9)
    assert u.shape == (4000, 9) and u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(draw(keys, 1, 2, 3), u[:, :3])
    assert np.abs(u.mean(0) - 0.5).max() < 0.025
    assert np.abs(np.corrcoef(u.T) - np.eye(9)).max() < 0.08


def test_flip_crop_and_erase_do_what_they_say() -> None:
    x, keys = images(200)
    flipped = render(x, keys, ViewsConfig(transforms=(Flip(),)), 0)
    is_flipped = (flipped == x.flip(3)).flatten(1).all(1)
    assert ((flipped == x).flatten(1).all(1) ^ is_flipped).all() and 70 < int(is_flipped.sum()) < 130
    padded = torch.nn.functional.pad(x, [2] * 4)
    windows = {(r, c): padded[:, :, r : r + 28, c : c + 28] for r in range(5) for c in range(5)}
    cropped = render(x, keys, ViewsConfig(transforms=(Crop(padding=2),)), 0)
    hits = torch.stack([(w == cropped).flatten(1).all(1) for w in windows.values()])
    assert (hits.sum(0) == 1).all() and (hits.sum(1) > 0).all()  # each is one window, and all windows occur
    assert render(x, keys, ViewsConfig(transforms=(Crop(size=24),)), 0).shape == (200, 1, 24, 24)
    erased = render(x, keys, ViewsConfig(transforms=(Erase(p=0.5),)), 0)
    gone = (erased == 0).flatten(1).float().mean(1)
    assert 70 < int((gone > 0).sum()) < 130 and float(gone.max()) < 0.4


# Joining --------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.randoms())
def test_any_subset_in_any_order_finds_its_own_rows(size: int, random) -> None:
    keys = sample_keys({"x": np.arange(size)})
    chosen = np.array([random.randrange(size) for _ in range(random.randrange(1, 60))])
    rows = KeyTable("train", keys).rows(keys[chosen], np.arange(len(chosen)))
    np.testing.assert_array_equal(rows, chosen)


def test_equal_samples_keep_their_own_position() -> None:
    keys = sample_keys({"x": np.array([5, 7, 5, 5])})
    table = KeyTable("train", keys)
    np.testing.assert_array_equal(table.rows(keys, np.arange(4)), [0, 1, 2, 3])
    np.testing.assert_array_equal(table.rows(keys[[2, 1]]), [0, 1])  # without a position, the first


def test_an_unknown_key_is_a_mismatch_that_names_the_sample() -> None:
    keys = sample_keys({"x": np.arange(5)})
    changed = keys.copy()
    changed[3, 15] ^= 1
    with pytest.raises(Mismatch, match=f"sample 3 of train has key {changed[3].tobytes().hex()}"):
        KeyTable("train", keys).rows(changed, np.arange(5))


def test_keys_that_end_in_zero_bytes_are_not_confused() -> None:
    table = np.zeros((3, 16), np.uint8)
    table[1, 0], table[2, 15] = 1, 1
    np.testing.assert_array_equal(KeyTable("train", table).rows(table[::-1]), [2, 1, 0])


def test_json_and_arrays_have_one_digest() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'.encode()
    with pytest.raises(ValueError, match=r"NaN|Out of range"):
        canonical_json(float("nan"))
    assert array_digest(np.arange(3)) != array_digest(np.arange(3).astype(np.int32))
    assert array_digest(np.arange(3)) == array_digest(np.arange(3).astype(">i8"))
