"""The networks of the pipelines: shapes, sizes, taps, and what the committed transformers say."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "pipelines"))
    return importlib.import_module


def images(n: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def outputs(model: nn.Module, *paths: str) -> dict[str, torch.Tensor]:
    """What the modules give for ``images()``, and as ``""`` the model."""
    found: dict[str, torch.Tensor] = {}
    for path in ("", *paths):
        model.get_submodule(path).register_forward_hook(lambda _, __, output, path=path: found.update({path: output}))
    with torch.inference_mode():
        model.eval()(images())
    return found


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("stem", [None, 8])
def test_a_transformer_gives_tokens_a_class_token_and_attention_to_tap(part: Any, stem: int | None) -> None:
    model = part("parts.vit").ViT(patch=4, width=24, depth=3, heads=3, classes=10, stem=stem)
    found = outputs(model, "blocks.1", "blocks.2.attention.softmax", "norm", "pool")
    assert found[""].shape == (3, 10) and found["blocks.1"].shape == (3, 50, 24)
    probs = found["blocks.2.attention.softmax"]
    assert probs.shape == (3, 3, 50, 50) and torch.allclose(probs.sum(3), torch.ones(3, 3, 50))
    assert torch.equal(found["pool"], found["norm"][:, 0])
    block = 2 * 2 * 24 + (24 + 1) * 72 + (24 + 1) * 24 + (24 + 1) * 96 + (96 + 1) * 24
    embedding = (16 + 1) * 24 if stem is None else 9 * stem + 2 * stem + (4 * stem + 1) * 24
    assert size(model) == 3 * block + embedding + 24 + 50 * 24 + 2 * 24 + (24 + 1) * 10


def test_attention_is_the_function_that_torch_fuses(part: Any) -> None:
    torch.manual_seed(0)
    attention = part("parts.vit").Attention(12, heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (y.unflatten(2, (3, 4)).transpose(1, 2) for y in attention.qkv(x).chunk(3, 2))
    fused = nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(attention(x), attention.out(fused.transpose(1, 2).flatten(2)), atol=1e-12)


def test_a_block_adds_to_what_it_is_given(part: Any) -> None:
    torch.manual_seed(0)
    block, x = part("parts.vit").Block(12, heads=3, hidden=8), torch.randn(2, 5, 12)
    middle = x + block.attention(block.norm1(x))
    assert torch.equal(block(x), middle + block.mlp(block.norm2(middle)))


def test_networks_scale_pixels_themselves(part: Any) -> None:
    vit = part("parts.vit").ViT(patch=14, width=12, depth=1, heads=2, classes=4, mean=0.2, std=0.5)
    mobile = part("parts.mobilenet").MobileNet(4, ((4, 2),), last=4, classes=4, mean=0.2, std=0.5)
    for model, first in ((vit, vit.patches), (mobile, mobile.stem[0])):
        found: list[torch.Tensor] = []
        first.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
        model(images())
        assert torch.allclose(found[0], (images() / 255 - 0.2) / 0.5)


def test_a_transformer_tells_places_apart(part: Any) -> None:
    """Without positions, the logits would not depend on the order of the patches."""
    torch.manual_seed(0)
    model = part("parts.vit").ViT(patch=7, width=12, depth=1, heads=2, classes=4).eval()
    assert not torch.allclose(model(images()), model(images().roll(7, 3)), atol=1e-4)
    nn.init.zeros_(model.positions)
    assert torch.allclose(model(images()), model(images().roll(7, 3)), atol=1e-5)


@pytest.mark.parametrize(("patch", "width"), [(5, 12), (4, 13)])
def test_a_transformer_whose_sizes_do_not_divide_is_refused(part: Any, patch: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"a patch of {patch} must divide the size 28, and 3 heads the width {width}"):
        part("parts.vit").ViT(patch, width, depth=1, heads=3, classes=10)


def test_inverted_residuals(part: Any) -> None:
    module = part("parts.mobilenet")
    model = module.MobileNet(8, ((12, 2), (12, 1), (16, 1), (16, 2)), last=32, classes=10)
    found = outputs(model, "body.0", "body.1", "body.1.project", "last", "pool")
    assert [found[path].shape for path in ("", "body.0", "last", "pool")] == [
        (3, 10), (3, 12, 14, 14), (3, 32, 7, 7), (3, 32),
    ]  # fmt: skip
    assert torch.allclose(found["body.1"], found["body.0"] + found["body.1.project"])
    assert (found["body.1.project"] < 0).any()
    assert [block.shortcut for block in model.body] == [False, True, False, False]

    def block(n: int, m: int) -> int:
        return 4 * n * (n + 2) + 4 * n * (9 + 2) + 4 * n * m + 2 * m

    blocks = block(8, 12) + block(12, 12) + block(12, 16) + block(16, 16)
    assert size(model) == 8 * (9 + 2) + blocks + 32 * (16 + 2) + (32 + 1) * 10


def test_the_committed_transformers_are_those_of_their_recipes(part: Any) -> None:
    """Strict loading, and far better than chance on a few held-out images."""
    labels = part("parts.fashion_mnist").split("held_out")
    recipes = part("train_teachers").MEMBERS
    for name in ("e", "f"):
        model = recipes[name].model().eval()
        model.load_state_dict(load_file(ROOT / "data" / "teachers" / f"{name}.safetensors"))
        with torch.inference_mode():
            right = model(torch.from_numpy(labels[0][:200])).argmax(1) == torch.from_numpy(labels[1][:200])
        assert right.float().mean() > 0.8


@pytest.mark.parametrize("name", ["a", "e"])
def test_a_stopped_training_of_a_teacher_goes_on(part: Any, name: str, tmp_path: Path) -> None:
    """Weights, buffers and moments of either optimiser come back: one more step leads to the same bits."""
    module = part("train_teachers")

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = module.MEMBERS[name].model()
        return model, module.MEMBERS[name].optimizer(model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
        return model.state_dict()

    first, again = fresh(), fresh()
    step(*first)
    module.save(*first, 1, tmp_path / "x.state.safetensors")
    assert module.restore(*again, tmp_path / "x.state.safetensors") == 1
    once, resumed = step(*first), step(*again)
    assert all(torch.equal(once[key], resumed[key]) for key in once)


def test_the_weight_decay_of_a_transformer_is_of_matrices_and_kernels_only(part: Any) -> None:
    recipe = part("train_teachers").MEMBERS["e"]
    model = recipe.model()
    decayed, others = recipe.optimizer(model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(names) == len(decayed["params"]) + len(others["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    assert all(p.ndim in (2, 4) for p in decayed["params"])
    assert {name for p in others["params"] if p.ndim > 1 for name in [names[id(p)]]} == {"class_token", "positions"}
