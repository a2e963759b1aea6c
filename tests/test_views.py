"""Transforms: what each draws and computes, against oracles; and that a row's pixels depend on nothing but the row."""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import json
import math
import random
import re
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from conftest import Cli, load_module
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import ensemble_distill as ed
from ensemble_distill.cache.renderings import Rendering
from ensemble_distill.config import describe
from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.prefetch import prefetch
from ensemble_distill.recording.capture import Recorder
from ensemble_distill.recording.planning import prepare
from ensemble_distill.sources import pixels, views
from ensemble_distill.sources.views import audit, audit_differs, check_deterministic, render
from ensemble_distill.store.leases import Leases
from ensemble_distill.store.store import open_store
from ensemble_distill.transforms import Transform


def darken(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Each image times its own number."""
    return (images * u[:, 0, None, None, None]).to(images.dtype)


DARKEN = ed.Custom(name="darken", slots=1, function=darken)
ALL: dict[str, Transform] = {
    "flip": ed.Flip(),
    "crop": ed.Crop(padding=3),
    "erase": ed.Erase(p=0.7, fill=0.5),
    "rotate": ed.Rotate(degrees=40),
    "rotate_filled": ed.Rotate(degrees=180, fill=0.5),
    "brightness": ed.ColorJitter(brightness=0.6),
    "contrast": ed.ColorJitter(contrast=1.5),
    "jitter": ed.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2),
    "resized_crop": ed.ResizedCrop(size=9),
    "custom": DARKEN,
}
COLOURED = ("jitter",)


def of(*transforms: Transform, seed: int = 5) -> ed.ViewsConfig:
    return ed.ViewsConfig(transforms=transforms, seed=seed)


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Random images and their keys; floating ones lie in [0, 1]."""
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    images = torch.from_numpy(array)
    return (images if dtype == torch.uint8 else (images / 255).to(dtype)), sample_keys({"image": array})


def uniform(n: int, slots: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, slots)))


# A row's pixels are a function of the row -------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 3]), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.float16]),
    view=st.integers(1, 1000),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_any_memory(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, view: int, seed: int
) -> None:
    if name in COLOURED:
        shape = (shape[0], 3, *shape[2:])
    images, keys = some(shape, dtype, seed)
    config, before = of(ALL[name], seed=seed), images.clone()
    whole = render(images, keys, config, view)
    assert whole.dtype == dtype and whole.shape[:2] == images.shape[:2]
    assert torch.equal(images, before)
    for i in range(len(images)):
        alone = render(images[i : i + 1], keys[i : i + 1], config, view)
        assert alone.numpy().tobytes() == whole[i : i + 1].numpy().tobytes()
    assert torch.equal(render(images.flip(0), keys[::-1], config, view).flip(0), whole)
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(render(strided, keys, config, view), whole)
    if dtype.is_floating_point:
        assert float(whole.min()) >= 0 and float(whole.max()) <= 1


@pytest.mark.parametrize("name", ALL)
def test_a_large_image_is_the_same_on_more_threads(name: str) -> None:
    """Sums over many pixels are split between threads, by how many there are and how large the batch is."""
    images, keys = some((3, 3, 300, 260), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = render(images, keys, of(ALL[name]), 1)
        torch.set_num_threads(2)
        alone = torch.cat([render(images[i : i + 1], keys[i : i + 1], of(ALL[name]), 1) for i in range(3)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, alone)


GOLDEN = {
    "flip": "c0aafd5dbb7f7f5c",
    "crop": "3a521aa8fc9292c4",
    "erase": "4648285caff5fcbb",
    "rotate": "14b2e4674a2ed612",
    "rotate_filled": "d5feb0f672688e3e",
    "brightness": "ca947788c3dea02d",
    "contrast": "0fda00aaf544d580",
    "jitter": "4f127315fd886e9e",
    "resized_crop": "f397aa1964fdcc10",
    "custom": "1f0804cdcaeb5d25",
}


@pytest.mark.parametrize("name", ALL)
def test_views_are_what_they_have_always_been(name: str) -> None:
    """A cache holds what the ensemble said about these pixels: another digest here makes every such cache void."""
    images, keys = some((16, 3, 20, 24))
    transform = ed.Erase(p=0.7) if name == "erase" else ALL[name]  # a fill of 0.5 is nothing for integers
    out = render(images, keys, of(transform, ed.Flip()), 7)  # the flip's draws come after all of the transform's
    assert hashlib.sha256(out.numpy().tobytes()).hexdigest()[:16] == GOLDEN[name]


# Rotate -----------------------------------------------------------------------------------------------


def turned(images: torch.Tensor, degrees: float, fill: float = 0) -> torch.Tensor:
    """Every image by exactly this angle, counter-clockwise."""
    u = torch.full((len(images), 1), (degrees / 180 + 1) / 2, dtype=torch.float64)
    return pixels.rotate(images, u, ed.Rotate(degrees=180, fill=fill))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 8, 9, 28])
def test_quarter_turns_are_exact(size: int, dtype: torch.dtype) -> None:
    images, _ = some((4, 3, size, size), dtype)
    for quarters in (-2, -1, 0, 1, 2):
        assert torch.equal(turned(images, 90 * quarters), torch.rot90(images, quarters, (2, 3)))
    images, _ = some((4, 2, size, size + 3), dtype)
    assert torch.equal(turned(images, 180), images.flip(2, 3))


@given(
    st.floats(-180, 180),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.25, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_a_rotation_is_scipys(degrees: float, height: int, width: int, fill: float, seed: int) -> None:
    images, _ = some((1, 1, height, width), torch.float64, seed)
    a = math.radians((2 * ((degrees / 180 + 1) / 2) - 1) * 180)  # rounded as turned does
    matrix = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    # Rows and columns of the source for those of the result, both from the centre.
    centre = (np.array([height, width]) - 1) / 2
    expected = scipy.ndimage.affine_transform(
        images[0, 0].numpy(), matrix, centre - matrix @ centre, order=1, mode="grid-constant", cval=fill
    )
    np.testing.assert_allclose(turned(images, degrees, fill)[0, 0], expected, atol=2e-4)  # a grid of 2⁻¹⁶ pixels
    levels = (images * 255).round().to(torch.uint8)
    expected = scipy.ndimage.affine_transform(
        levels[0, 0].double().numpy(), matrix, centre - matrix @ centre, order=1, mode="grid-constant", cval=255 * fill
    )
    assert np.abs(turned(levels, degrees, 255 * fill)[0, 0].double().numpy() - expected).max() < 0.51


def test_angles_are_uniform_in_plus_minus_degrees() -> None:
    ramp = (torch.arange(9) / 8).double().expand(1, 9, 9)
    images = torch.stack([ramp, ramp.mT], 1).expand(4000, -1, -1, -1).reshape(4000, 2, 9, 9)  # x and y, rising
    keys = sample_keys({"x": np.arange(4000)})
    out = render(images, keys, of(ed.Rotate(degrees=30)), 1)
    down, right = out[:, 0, 5, 4] - out[:, 0, 3, 4], out[:, 0, 4, 5] - out[:, 0, 4, 3]
    angles = torch.rad2deg(torch.atan2(-down, right)).numpy()
    assert np.abs(angles).max() < 30.01
    assert scipy.stats.kstest(angles, "uniform", (-30, 60)).pvalue > 0.01
    assert abs(angles.mean()) < 1 and abs(angles.std() - 60 / math.sqrt(12)) < 0.5


# ResizedCrop ------------------------------------------------------------------------------------------


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    st.integers(0, 2**32 - 1),
)
def test_a_resized_crop_is_interpolates(height: int, width: int, size: int, dtype: torch.dtype, seed: int) -> None:
    images, _ = some((5, 2, height, width), dtype, seed)
    u, config = uniform(5, 4, seed), ed.ResizedCrop(size=size)
    out = pixels.resized_crop(images, u, config)
    for image, (a, r, y, x), found in zip(images, u.tolist(), out, strict=True):
        area, aspect = (0.08 + 0.92 * a) * height * width, 3 / 4 * (16 / 9) ** r
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
        window = image[None, :, top : top + h, left : left + w].double()
        expected = torch.nn.functional.interpolate(window, (size, size), mode="bilinear", align_corners=False)[0]
        tolerance = 0.51 if dtype == torch.uint8 else 1e-4
        assert float((found.double() - expected).abs().max()) < tolerance


def test_the_crop_of_everything_at_its_own_size_is_the_image() -> None:
    for dtype in (torch.uint8, torch.float32):
        images, keys = some((4, 3, 17, 17), dtype)
        whole = ed.ResizedCrop(size=17, area=(1, 1), aspect=(1, 1))
        assert torch.equal(render(images, keys, of(whole), 3), images)


def test_area_aspect_and_position_are_distributed_as_documented() -> None:
    ramp = (torch.arange(128) / 128).double().expand(1, 128, 128)
    images = torch.stack([ramp, ramp.mT], 1).expand(600, -1, -1, -1)
    keys = sample_keys({"x": np.arange(600)})
    out = render(images, keys, of(ed.ResizedCrop(size=5, area=(0.1, 0.5), aspect=(0.5, 2))), 1).numpy()
    w, h = out[:, 0, 2, 3] - out[:, 0, 2, 1], out[:, 1, 3, 2] - out[:, 1, 1, 2]
    w, h = w * 5 / 2, h * 5 / 2  # three of the five centres, of which each is a fifth from the next
    x, y = out[:, 0, 2, 2] - w / 2, out[:, 1, 2, 2] - h / 2
    assert scipy.stats.kstest(w * h, "uniform", (0.1, 0.4)).pvalue > 0.01
    assert abs((w * h).mean() - 0.3) < 0.01
    assert scipy.stats.kstest(np.log2(w / h), "uniform", (-1, 2)).pvalue > 0.01
    for corner, length in ((x, w), (y, h)):
        assert scipy.stats.kstest(corner / (1 - length), "uniform").pvalue > 0.01


def test_a_crop_that_is_wider_than_the_image_is_clipped_to_it() -> None:
    images, _ = some((1, 1, 4, 50))
    tall = ed.ResizedCrop(size=4, area=(1, 1), aspect=(1, 1))  # √200 is more than four rows
    out = pixels.resized_crop(images, torch.zeros(1, 4, dtype=torch.float64), tall)
    expected = torch.nn.functional.interpolate(images[:, :, :, :14].double(), (4, 4), mode="bilinear")
    assert float((out - expected).abs().max()) < 0.51


# ColorJitter ------------------------------------------------------------------------------------------


def jittered(image: np.ndarray, u: np.ndarray, config: ed.ColorJitter) -> np.ndarray:
    """One image float64 [3, H, W] in [0, 1], pixel by pixel, in plain Python and colorsys."""

    def factor(u: float, amount: float) -> float:
        low = max(0, 1 - amount)
        return low + u * (1 + amount - low)

    def gray(p: list[float]) -> float:
        return 0.2989 * p[0] + 0.587 * p[1] + 0.114 * p[2]

    def mix(p: list[float], other: float, f: float) -> list[float]:
        return [min(max(f * c + (1 - f) * other, 0), 1) for c in p]

    f = [factor(x, a) for x, a in zip(u, (config.brightness, config.contrast, config.saturation), strict=False)]
    points = [mix(p, 0, f[0]) for p in image.reshape(3, -1).T.tolist()]
    mean = sum(map(gray, points)) / len(points)
    points = [mix(p, mean, f[1]) for p in points]
    points = [mix(p, gray(p), f[2]) for p in points]
    turn = (2 * u[3] - 1) * config.hue
    hsv = [colorsys.rgb_to_hsv(*p) for p in points]
    points = [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]
    return np.array(points).T.reshape(image.shape)


@given(
    st.tuples(*[st.floats(0, 2)] * 3, st.floats(0, 0.5)),
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    st.booleans(),
)
def test_colours_are_those_of_colorsys(amounts: tuple[float, ...], seed: int, dtype: torch.dtype, coarse: bool) -> None:
    images, _ = some((3, 3, 5, 6), dtype, seed)
    if coarse:  # many gray pixels, and many whose largest channels are equal
        images = (images > images.max() / 2).to(dtype) * images.max()
    config = ed.ColorJitter(**dict(zip(("brightness", "contrast", "saturation", "hue"), amounts, strict=True)))
    u = uniform(3, 4, seed)
    out = pixels.color_jitter(images, u, config).double().numpy()
    white, tolerance = (255, 0.502) if dtype == torch.uint8 else (1, 1e-9 if dtype == torch.float64 else 1e-5)
    for image, draws, found in zip(images.double().numpy() / white, u.numpy(), out, strict=True):
        assert np.abs(found - white * jittered(image, draws, config)).max() < max(tolerance, 4e-7 * white)


def test_one_channel_has_brightness_and_contrast() -> None:
    images, _ = some((6, 1, 8, 8), torch.float64)
    u = uniform(6, 4)
    out = pixels.color_jitter(images, u, ed.ColorJitter(brightness=0.3, contrast=0.3))
    bright = (images * (0.7 + 0.6 * u[:, 0, None, None, None])).clamp(0, 1)
    f = 0.7 + 0.6 * u[:, 1, None, None, None]
    expected = (f * bright + (1 - f) * bright.mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_factors_are_uniform_and_each_has_its_own_slot() -> None:
    keys = sample_keys({"x": np.arange(4000)})
    flat = torch.full((4000, 1, 1, 1), 0.25, dtype=torch.float64)
    for amount, low in ((0.4, 0.6), (2.0, 0.0)):
        factors = render(flat, keys, of(ed.ColorJitter(brightness=amount)), 1).flatten().numpy() / 0.25
        assert scipy.stats.kstest(factors, "uniform", (low, 1 + amount - low)).pvalue > 0.01
    pair = torch.tensor([0.4, 0.6]).double().reshape(1, 1, 1, 2).expand(4000, -1, -1, -1)
    out = render(pair, keys, of(ed.ColorJitter(contrast=0.4)), 1)
    factors = ((out[..., 1] - out[..., 0]) / 0.2).flatten().numpy()
    assert scipy.stats.kstest(factors, "uniform", (0.6, 0.8)).pvalue > 0.01
    red = torch.tensor([0.8, 0.2, 0.2]).double().reshape(1, 3, 1, 1).expand(4000, -1, -1, -1)
    out = render(red, keys, of(ed.ColorJitter(hue=0.1)), 1)[:, :, 0, 0].numpy()
    hues = np.array([(colorsys.rgb_to_hsv(*p)[0] + 0.5) % 1 - 0.5 for p in out])
    assert scipy.stats.kstest(hues, "uniform", (-0.1, 0.2)).pvalue > 0.01 and abs(hues.mean()) < 0.005
    out = render(red, keys, of(ed.ColorJitter(saturation=0.4)), 1)[:, :, 0, 0]
    factors = ((out[:, 0] - out[:, 1]) / 0.6).numpy()
    assert scipy.stats.kstest(factors, "uniform", (0.6, 0.8)).pvalue > 0.01
    assert abs(np.corrcoef(factors, hues)[0, 1]) < 0.05


def test_without_amounts_nothing_changes() -> None:
    for dtype in (torch.uint8, torch.float32):
        images, keys = some((4, 3, 5, 5), dtype)
        assert torch.equal(render(images, keys, of(ed.ColorJitter()), 1), images)
        assert torch.equal(render(images, keys, of(ed.Rotate(degrees=0)), 1), images)


# What cannot be ---------------------------------------------------------------------------------------


def test_what_a_transform_cannot_do_is_said() -> None:
    gray, keys = some((4, 1, 5, 5))
    for amount in ({"saturation": 0.1}, {"hue": 0.1}):
        with pytest.raises(UsageError, match=r"saturation and hue of three channels only, these images have 1"):
            render(gray, keys, of(ed.ColorJitter(**amount)), 1)
    for transform, name in ((ed.Rotate(degrees=9), "Rotate"), (ed.ColorJitter(), "ColorJitter")):
        with pytest.raises(UsageError, match=rf"{name} needs uint8 or floating images, not torch\.int16"):
            render(gray.to(torch.int16), keys, of(transform), 1)
    with pytest.raises(UsageError, match="draw 1028 numbers, there are 1024"):
        render(gray, keys, of(*[ed.Custom(name="a", slots=257, function=lambda x, u: x)] * 4), 1)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ed.Rotate, {}),
        (ed.Rotate, {"degrees": -1}),
        (ed.Rotate, {"degrees": 181}),
        (ed.Rotate, {"degrees": math.nan}),
        (ed.Rotate, {"degrees": 9, "fill": 256}),
        (ed.ColorJitter, {"brightness": -0.1}),
        (ed.ColorJitter, {"contrast": math.inf}),
        (ed.ColorJitter, {"hue": 0.6}),
        (ed.ResizedCrop, {}),
        (ed.ResizedCrop, {"size": 0}),
        (ed.ResizedCrop, {"size": 2**40}),
        (ed.ResizedCrop, {"size": 8, "area": (0, 1)}),
        (ed.ResizedCrop, {"size": 8, "area": (0.5, 0.4)}),
        (ed.ResizedCrop, {"size": 8, "area": (0.5, 1.1)}),
        (ed.ResizedCrop, {"size": 8, "aspect": (2, 1)}),
        (ed.ResizedCrop, {"size": 8, "aspect": (0, 1)}),
        (ed.Custom, {"name": "a b", "slots": 1}),
        (ed.Custom, {"name": "a", "slots": -1}),
        (ed.Custom, {"name": "a", "slots": 1025}),
        (ed.Custom, {"name": "a", "slots": 1, "function": "os.system"}),
    ],
)
def test_numbers_out_of_range_are_refused(kind: type[Any], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind(**fields)


# Custom -----------------------------------------------------------------------------------------------


def test_a_custom_transform_gets_its_own_draws_and_a_plan_knows_its_name_and_slots() -> None:
    images, keys = some((5, 1, 4, 4), torch.float64)
    config = of(ed.Flip(), ed.Custom(name="fixed", slots=0, function=lambda x, u: 1 - x), DARKEN, seed=8)
    u = torch.from_numpy(views.draw(keys, 8, 3, 2))
    expected = (1 - render(images, keys, of(ed.Flip(), seed=8), 3)) * u[:, 1, None, None, None]
    assert torch.equal(render(images, keys, config, 3), expected)

    dumped = config.model_dump(mode="json")
    assert dumped["transforms"][2] == {"kind": "custom", "name": "darken", "slots": 1}
    assert describe(config)["transforms"][2] == dumped["transforms"][2]
    read = ed.ViewsConfig.model_validate_json(json.dumps(dumped))
    assert read.transforms[2].function is None
    assert read == config and hash(read.transforms[2]) == hash(DARKEN)
    for other in (ed.Custom(name="dark", slots=1, function=darken), ed.Custom(name="darken", slots=2), ed.Flip()):
        assert other != DARKEN
    with pytest.raises(UsageError, match="'fixed' has no function: a plan knows it by its name only"):
        render(images, keys, read, 3)
    only = of(ed.Custom(name="fixed", slots=0, function=lambda x, u: x + u.sum()))
    assert torch.equal(render(images, keys, only, 3), images)


def test_what_a_custom_transform_shares_between_its_calls_is_no_matter_to_threads() -> None:
    generator = torch.Generator()

    def noise(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rows = []
        for image, seed in zip(images, (u[:, 0] * 2**32).long().tolist(), strict=True):
            generator.manual_seed(seed)
            time.sleep(0)  # here another thread may run
            rows.append(image + torch.rand(image.shape, generator=generator))
        return torch.stack(rows)

    images, keys = some((40, 1, 3, 3), torch.float32)
    config = of(ed.Custom(name="noise", slots=1, function=noise))
    check_deterministic(images, keys, config)
    tasks = [partial(render, images, keys, config, view) for view in range(1, 21)]
    for made, alone in zip(list(prefetch(tasks, 4)), [task() for task in tasks], strict=True):
        assert torch.equal(made, alone)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, u: None, "returned a NoneType, not a tensor"),
        (lambda x, u: x.float(), r"made \[5, 3, 6, 6\] torch.float32 of \[5, 3, 6, 6\] torch.uint8"),
        (lambda x, u: x[:4], r"made \[4, 3, 6, 6\]"),
        (lambda x, u: x[:, 0], r"made \[5, 6, 6\]"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(function: Any, reason: str) -> None:
    images, keys = some((5, 3, 6, 6))
    with pytest.raises(UsageError, match=reason):
        render(images, keys, of(ed.Custom(name="bad", slots=1, function=function)), 1)


def by_the_batch(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return (images - images.double().mean()).to(images.dtype)


def in_place(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    images[:, :, 0] = 0
    return images


def counting(images: torch.Tensor, u: torch.Tensor, count: Any = itertools.count()) -> torch.Tensor:  # noqa: B008
    return images + next(count) % 2


def last_row(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return torch.cat([images[:-1] + 1, images[-1:]])


def seeding(images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The same each time, for it seeds; and a student's dropout draws in between."""
    torch.manual_seed(5)
    return images + torch.randint_like(images, 2)


class Buffered:
    """A transform that answers in buffers of its own, one after another."""

    def __init__(self, count: int) -> None:
        self.held, self.next = {}, itertools.cycle(range(count))

    def __call__(self, images: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        place = (next(self.next), images.shape, images.dtype)
        out = self.held.setdefault(place, torch.empty_like(images))
        return torch.add(images, (u[:, :1, None, None] * 9).to(images.dtype), out=out)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Buffered(1), "writes into the images that it gave before"),
        (Buffered(2), "writes into the images that it gave before"),
        (Buffered(3), "writes into the images that it gave before"),
        (lambda x, u: x + torch.randint_like(x, 2), "draws from a generator of the whole process"),
        (seeding, "draws from a generator of the whole process, or seeds it"),
        (lambda x, u: x + random.randrange(2), "draws from a generator"),
        (lambda x, u: x + np.random.randint(2), "draws from a generator"),  # noqa: NPY002
        (counting, "rendered again"),
        (by_the_batch, "rendered alone than in its batch"),
        (last_row, "rendered alone than in its batch"),
        (lambda x, u: x + u.max().round().to(x.dtype) if len(x) > 1 else x, "rendered alone than in its batch"),
        (in_place, "changes the images that it is given"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_transform_that_is_no_function_of_the_row_is_named(function: Any, reason: str, dtype: torch.dtype) -> None:
    images, keys = some((40, 1, 6, 6), dtype)
    config = of(ed.Flip(), DARKEN, ed.Custom(name="bad", slots=1, function=function))
    with pytest.raises(UsageError, match=f"custom 'bad' .*{reason}"):
        check_deterministic(images, keys, config)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_transforms_that_are_functions_of_the_row_pass(n: int, dtype: torch.dtype) -> None:
    images, keys = some((n, 3, 12, 12), dtype)
    check_deterministic(images, keys, of(*ALL.values()))
    check_deterministic(images, keys, of())
    if dtype.is_floating_point:  # what is no number is nevertheless the same each time
        check_deterministic(images, keys, of(ed.Custom(name="nan", slots=0, function=lambda x, u: x * float("nan"))))


def with_views(pipeline: ModuleType, *transforms: Transform) -> ed.DataConfig:
    return pipeline.data().model_copy(update={"views": of(*transforms)})


def test_a_cache_of_custom_views_is_read_with_the_pipelines_function(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    data, store = with_views(pipeline, ed.Flip(), DARKEN), open_store(tmp_path / "cache", create=True)
    leases = Leases(store.storage)
    for _ in range(2):  # the second finds the plan of the first, which is the same
        plan, ensemble = prepare(data, pipeline.cache(), data.sources, store, leases, [torch.device("cpu")])
        Recorder(plan, ensemble, data.sources, store, leases).run()
    cache, source = ed.open_cache(tmp_path / "cache"), data.sources["train"]
    with pytest.raises(UsageError, match="'darken' has no function"):
        next(cache.loader(source, 50, epoch=1))
    cache.check(data)
    batch = next(cache.loader(source, 50, epoch=1))
    loaded = source.load(batch.index)
    seen = render(torch.from_numpy(loaded.inputs["image"]), loaded.keys, data.views, 1)
    assert batch.view == 1 and torch.equal(batch.inputs["image"], seen)
    torch.testing.assert_close(batch.targets.logprobs, ensemble({"image": seen}).logprobs, atol=2e-3, rtol=1e-3)


def test_nothing_is_written_where_a_transform_draws_by_chance(teachers: Path, tmp_path: Path) -> None:
    pipeline = load_module(teachers / "digits.py")
    noise = ed.Custom(name="noise", slots=1, function=lambda x, u: x + torch.randint_like(x, 2))
    data, store = with_views(pipeline, noise), open_store(tmp_path / "cache", create=True)
    before = sorted(p.name for p in (tmp_path / "cache").rglob("*"))
    arguments = (data.sources, store, Leases(store.storage), [torch.device("cpu")])
    with pytest.raises(UsageError, match="custom 'noise' draws from a generator"):
        prepare(data, pipeline.cache(), *arguments)
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*")) == before
    one_view = pipeline.cache().model_copy(update={"views": 1})  # of which the transforms draw nothing
    prepare(data, one_view, *arguments)


def test_custom_views_on_the_command_line(cli: Cli) -> None:
    cli.change(
        "transforms=(ed.Crop(padding=1),)",
        "transforms=(ed.Rotate(degrees=9), ed.Custom(name='dim', slots=1, function=dim))",
    )
    cli.change(
        "def data():", "def dim(x, u):\n    return x // (1 + (u < 0.5).byte()[:, :, None, None])\n\n\ndef data():"
    )
    cli("cache", "digits.py", "--out", "cache")
    assert "custom 'dim'" in cli("inspect", "cache").stdout
    cli("train", "digits.py", "--cache", "cache", "--out", "run", "--set", "epochs=2")
    cli.change("name='dim'", "name='dimmer'", to="other.py")
    process = cli("train", "other.py", "--cache", "cache", "--out", "other", code=3)
    assert "views.transforms[1].name = 'dim'" in process.stderr


def test_the_custom_transform_of_the_documents_runs_as_it_stands() -> None:
    text = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
    names: dict[str, Any] = {"torch": torch, "ed": ed}
    code = re.search(r"```python\n(def noise.*?)```", text, re.DOTALL)[1]
    exec(code.replace("ed.ViewsConfig", "config = ed.ViewsConfig"), names)
    images, keys = some((20, 3, 8, 8))
    check_deterministic(images, keys, names["config"])
    assert not torch.equal(render(images, keys, names["config"], 1), render(images, keys, names["config"], 2))


def test_every_transform_is_documented_with_its_parameters_and_slots() -> None:
    text = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
    for kind, slots in views._SLOTS.items():
        row = re.search(rf"^\| `{kind.__name__}` \|(.*?)\| {slots} \|", text, re.MULTILINE)
        assert row, kind
        assert all(f"`{field}`" in row[1] for field in kind.model_fields if field != "kind")


# Audit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.int16])
def test_an_audit_is_small_json_of_the_first_samples(dtype: torch.dtype) -> None:
    images, keys = some((10, 3, 28, 30), torch.float32 if dtype == torch.float16 else torch.uint8)
    images = (images.int() * 128).to(dtype) if dtype == torch.int16 else images.to(dtype)
    if dtype == torch.float32:
        images = images / 255
    made = audit(images, keys, of(ed.Flip()), (0, 2, 1))
    assert [(e["sample"], e["view"]) for e in made] == [(s, v) for s in range(4) for v in range(3)]
    assert made == json.loads(json.dumps(made)) and len(json.dumps(made)) < 6000
    assert made[3]["key"] == keys[1].tobytes().hex() and made[3]["shape"] == [3, 8, 8]
    if dtype == torch.uint8:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images[1].double(), 8).round().to(torch.uint8)
        assert bytes.fromhex(made[3]["cells"]) == pooled.numpy().tobytes()
    if dtype == torch.float32:  # the same pixels in [0, 1] give the same levels, where a mean is no half
        levels = (images * 255).round().to(torch.uint8)
        assert not audit_differs(audit(levels, keys, of(ed.Flip()), (0, 1, 2)), made, 1)
    assert not audit_differs(made, audit(images[:6], keys[:6], of(ed.Flip()), (0, 1, 2)), 0)


def test_small_images_are_kept_whole() -> None:
    images, keys = some((2, 1, 5, 9))
    made = audit(images, keys, of(ed.Flip()), (0,))
    assert [e["shape"] for e in made] == [[1, 5, 8]] * 2


def textured(n: int) -> tuple[torch.Tensor, np.ndarray]:
    """Smooth images, as photographs are: what pooling leaves of noise is gray."""
    noise, keys = some((n, 3, 7, 7), torch.float32)
    return torch.nn.functional.interpolate(noise, (28, 28), mode="bicubic").clamp(0, 1), keys


def test_a_transform_that_was_changed_under_its_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    images, keys = textured(4)
    config, numbers = of(ed.Flip(), ed.Rotate(degrees=20), DARKEN), (0, 1, 2, 3)
    expected = json.loads(json.dumps(audit(images, keys, config, numbers)))
    assert audit_differs(expected, audit(images, keys, config, numbers)) == ""

    lighter = ed.Custom(name="darken", slots=1, function=lambda x, u: 1 - darken(x, u))
    changed = of(ed.Flip(), ed.Rotate(degrees=20), lighter)
    assert changed == config  # so only the pixels tell
    assert audit_differs(expected, audit(images, keys, changed, numbers)).startswith("sample 0 in view 1 differs by ")

    with monkeypatch.context() as patch:
        patch.setattr(views, "_flip", lambda images, u: images.flip(2))
        assert "in view 1 differs" in audit_differs(expected, audit(images, keys, config, numbers))
    with monkeypatch.context() as patch:
        patch.setattr(views, "rotate", lambda images, u, config: pixels.rotate(images, 1 - u, config))
        assert "in view 1 differs" in audit_differs(expected, audit(images, keys, config, numbers))
    with monkeypatch.context() as patch:
        draw = views.draw
        patch.setattr(views, "draw", lambda keys, seed, view, slots: draw(keys, seed + 1, view, slots))
        assert "differs" in audit_differs(expected, audit(images, keys, config, numbers))


def test_a_level_more_or_less_is_no_change() -> None:
    images, keys = some((4, 1, 8, 8))
    images = images.clamp(10, 240)
    expected = audit(images, keys, of(ed.Flip()), (0, 1))
    signs = torch.from_numpy(np.random.default_rng(1).integers(-1, 2, images.shape))
    nearly = audit((images + signs).to(torch.uint8), keys, of(ed.Flip()), (0, 1))
    assert nearly != expected and audit_differs(expected, nearly) == ""
    assert audit_differs(expected, nearly, tolerance=0)
    images[2, 0, 3, 4] += 3
    assert audit_differs(expected, audit(images, keys, of(ed.Flip()), (0, 1))) == (
        "sample 2 in view 0 differs by 3 levels of 255"
    )


@pytest.mark.parametrize(("low", "high"), [(-80, -20), (-3, 3), (0, 40_000), (-0.002, 0.001), (-2, 0.7)])
def test_of_images_outside_of_0_to_1_a_change_is_found_too(low: float, high: float) -> None:
    noise, keys = some((4, 2, 16, 16), torch.float32)
    images, config = low + (high - low) * noise, of(ed.Flip(), DARKEN)
    expected = json.loads(json.dumps(audit(images, keys, config, (0, 1))))
    assert audit_differs(expected, expected) == "" and any("values" in entry for entry in expected)
    bits = audit(images * (1 + 1e-6), keys, config, (0, 1))
    assert bits != expected and audit_differs(expected, bits) == "" == audit_differs(bits, expected)
    lighter = of(ed.Flip(), ed.Custom(name="darken", slots=1, function=lambda x, u: 1.05 * darken(x, u)))
    found = audit_differs(expected, audit(images, keys, lighter, (0, 1)))
    assert found.startswith("sample 0 in view 1 differs")
    inside = audit(images.clamp(0.2, 0.8), keys, config, (0, 1))
    assert "differs" in audit_differs(expected, inside) and "differs" in audit_differs(inside, expected)
    if high - low > 1:  # all black or white to levels, as they were
        assert "differs" in audit_differs(expected, audit(images.clamp(0, 1), keys, config, (0, 1)))
    of_before = [{name: entry[name] for name in entry if name != "values"} for entry in expected]
    assert audit_differs(of_before, expected) == ""
    assert Rendering.model_validate(expected[0]).model_dump(mode="json") == expected[0]
    assert Rendering.model_validate(of_before[0]).model_dump(mode="json") == of_before[0]


def test_values_are_as_many_as_cells() -> None:
    images, keys = some((1, 1, 4, 4), torch.float32)
    (entry,) = audit(images - 5, keys, of(ed.Flip()), (0,))
    with pytest.raises(ValueError, match="120 digits are no values"):
        Rendering.model_validate(entry | {"values": entry["values"][:-8]})


def test_audits_of_other_samples_shapes_or_views_differ() -> None:
    images, keys = some((3, 1, 8, 8))
    config = of(ed.Flip())
    expected = audit(images, keys, config, (0, 1))
    assert audit_differs(expected, expected[:-1]) == "sample 2 in view 1 is missing"
    assert audit_differs(expected[:-1], expected) == "sample 2 in view 1 was not expected"
    assert "sample 0 in view 0 has key" in audit_differs(expected, audit(images, keys[::-1].copy(), config, (0, 1)))
    assert "is [1, 8, 6], expected [1, 8, 8]" in audit_differs(expected, audit(images[..., :6], keys, config, (0, 1)))
    assert audit(images[:0], keys[:0], config, (0, 1)) == []
