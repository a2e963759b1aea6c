"""Foreign transforms in views: pure functions of (image, u), whatever else draws in the process meanwhile."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch

import ensemble_distill as ed
from ensemble_distill.errors import UsageError
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.interop.torchvision import _DRAWING, from_torchvision
from ensemble_distill.sources.views import check_deterministic, render


class LikeV2(torch.nn.Module):
    """Draws as torchvision's v2 does, by torch's global generator: a flip, a shift, noise, an order, a choice."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if torch.rand(1) < 0.5:
            image = image.flip(-1)
        image = torch.roll(image, int(torch.randint(0, image.shape[-1], size=(1,)).item()), -1)
        image = image[torch.randperm(image.shape[0])]
        scale = torch.empty(1).uniform_(0.2, 1.0).item() + 0.1 * float(torch.multinomial(torch.ones(3), 1))
        noise = torch.randn(image.shape) * 9 + torch.normal(0.0, 1.0, image.shape)
        return (image * scale + noise).clamp(0, 255).to(image.dtype)


def in_place(image: torch.Tensor) -> torch.Tensor:
    return image.mul_(0).add_(int(torch.randint(0, 200, ())))


def some(n: int = 6) -> tuple[torch.Tensor, np.ndarray]:
    array = np.random.default_rng(0).integers(0, 256, (n, 3, 9, 8), dtype=np.uint8)
    return torch.from_numpy(array), sample_keys({"image": array})


def of(transform: Any) -> ed.ViewsConfig:
    return ed.ViewsConfig(transforms=(ed.Flip(), from_torchvision("foreign", transform)), seed=2)


@pytest.mark.parametrize("transform", [LikeV2(), in_place])
def test_a_foreign_transform_is_a_function_of_image_and_draws(transform: Any) -> None:
    images, keys = some()
    before = images.clone()
    check_deterministic(images, keys, of(transform))
    whole = render(images, keys, of(transform), 1)
    torch.rand(7)
    assert torch.equal(render(images, keys, of(transform), 1), whole) and torch.equal(images, before)
    assert torch.equal(render(images.flip(0), keys[::-1].copy(), of(transform), 1).flip(0), whole)
    assert not torch.equal(render(images, keys, of(transform), 2), whole)
    assert len({row.numpy().tobytes() for row in render(images[:1].expand(6, -1, -1, -1), keys, of(transform), 1)}) > 3


def test_it_draws_what_torch_draws_under_that_seed() -> None:
    images, _ = some(1)
    u = torch.tensor([[0.75, 2.0**-32 * 5]], dtype=torch.float64)
    custom = from_torchvision("foreign", LikeV2())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((int(0.75 * 2**32) >> 1) << 32 | 5)
        expected = LikeV2()(images[0])
    assert torch.equal(custom.function(images, u)[0], expected)
    assert (custom.name, custom.slots) == ("foreign", 2)


HALF = torch.full((9,), 0.5)
DRAWS: dict[str, Any] = {
    "bernoulli": lambda: torch.bernoulli(HALF),
    "multinomial": lambda: torch.multinomial(HALF, 9),
    "normal": lambda: torch.normal(0.0, 1.0, (9,)),
    "poisson": lambda: torch.poisson(HALF * 9),
    "rand": lambda: torch.rand(9),
    "randint": lambda: torch.randint(0, 99, (9,)),
    "randn": lambda: torch.randn(9),
    "randperm": lambda: torch.randperm(9),
    "bernoulli_": lambda: torch.empty(9).bernoulli_(0.5),
    "cauchy_": lambda: torch.empty(9).cauchy_(),
    "exponential_": lambda: torch.empty(9).exponential_(),
    "geometric_": lambda: torch.empty(9).geometric_(0.1),
    "log_normal_": lambda: torch.empty(9).log_normal_(),
    "normal_": lambda: torch.empty(9).normal_(),
    "random_": lambda: torch.empty(9).random_(0, 99),
    "uniform_": lambda: torch.empty(9).uniform_(),
}


@pytest.mark.parametrize("name", sorted(_DRAWING))
def test_each_drawing_function_of_torch_is_seeded(name: str) -> None:
    def transform(image: torch.Tensor) -> torch.Tensor:
        return DRAWS[name]().reshape(1, 3, 3).to(image.dtype)

    images, u = torch.zeros(4, 1, 3, 3), torch.rand(4, 2, dtype=torch.float64)
    state = torch.get_rng_state()
    function = from_torchvision("foreign", transform).function
    once, again = function(images, u), function(images, u)
    assert torch.equal(once, again) and not torch.equal(once[0], once[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_generator_is_left_alone_and_leaves_alone() -> None:
    """A training loop draws its dropout while the loader's threads render."""
    images, keys = some(40)
    expected = render(images, keys, of(LikeV2()), 1)
    torch.manual_seed(3)
    alone = [torch.rand(1000).sum() for _ in range(200)]
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(render(images, keys, of(LikeV2()), 1) for _ in range(3)))
        for _ in range(3)
    ]
    torch.manual_seed(3)
    for thread in threads:
        thread.start()
    together = [torch.rand(1000).sum() for _ in range(200)]
    for thread in threads:
        thread.join()
    assert together == alone
    assert len(found) == 9 and all(torch.equal(images, expected) for images in found)


@pytest.mark.parametrize(
    "transform",
    [
        lambda x: x + random.randrange(200),
        lambda x: (x + torch.rand_like(x, dtype=torch.float32) * 99).to(x.dtype),
        lambda x: torch.nn.functional.dropout(x.float()).to(x.dtype),
    ],
)
def test_what_draws_by_other_means_is_refused(transform: Any) -> None:
    images, keys = some()
    with pytest.raises(UsageError, match="custom 'foreign' draws from a generator"):
        check_deterministic(images, keys, of(transform))


def test_another_dtype_is_refused() -> None:
    images, keys = some()
    with pytest.raises(UsageError, match=r"'foreign' made .* torch.float32"):
        render(images, keys, of(lambda x: x.float()), 1)


def test_transforms_of_torchvision_itself() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=ImportError)
    images, keys = some()
    for transform in (
        v2.RandomHorizontalFlip(), v2.RandAugment(), v2.TrivialAugmentWide(), v2.RandomErasing(),
        v2.RandomResizedCrop(8, antialias=True), v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomPerspective(),
        v2.Compose([v2.RandomAffine(20), v2.GaussianBlur(3)]),
    ):  # fmt: skip
        check_deterministic(images, keys, of(transform))
