"""Usual taps of timm's and torchvision's models, on stand-ins with modules of the same names, and on their models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_distill.errors import UsageError
from ensemble_distill.interop import timm as of_timm
from ensemble_distill.interop import torchvision as of_torchvision
from ensemble_distill.interop.attention import ExplicitAttention


def holding(*paths: str) -> nn.Module:
    """A module that holds others at these paths."""
    root = nn.Module()
    for path in paths:
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        place.add_module(name, nn.Module())
    return root


def conv(kernel: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, kernel, stride), nn.BatchNorm2d(1), nn.ReLU())


def features(*children: nn.Module, pool: bool = True) -> nn.Module:
    model = nn.Module()
    model.features = nn.Sequential(*children)
    if pool:
        model.avgpool = nn.AdaptiveAvgPool2d(1)
    return model


def stages(*paths: str) -> dict[str, str]:
    return {f"stage{i}": path for i, path in enumerate(paths, 1)}


LAYERS = ("layer1", "layer2", "layer3", "layer4")
CONVOLUTIONAL: list[tuple[nn.Module, dict[str, str]]] = [
    (
        holding("conv1", *LAYERS, "layer2.0.conv1", "global_pool.flatten", "fc"),
        stages(*LAYERS) | {"pool": "global_pool"},
    ),
    (
        holding("stem", "stages.0.blocks.0", "stages.1.blocks.0", "head.global_pool.pool", "head.flatten"),
        stages("stages.0", "stages.1") | {"pool": "head.global_pool"},
    ),
    (
        holding("conv_stem", *(f"blocks.{i}.0" for i in range(11)), "conv_head", "global_pool"),
        stages(*(f"blocks.{i}" for i in range(11))) | {"pool": "global_pool"},
    ),
]


def test_names_are_in_the_order_of_the_numbers() -> None:
    model = holding("layer2", "layer10", "layer1", "global_pool")
    assert of_timm.taps(model) == stages("layer1", "layer2", "layer10") | {"pool": "global_pool"}


@pytest.mark.parametrize(("model", "expected"), CONVOLUTIONAL)
def test_stages_and_pool_of_timm(model: nn.Module, expected: dict[str, str]) -> None:
    assert list(of_timm.taps(model).items()) == list(expected.items())


class Timm(nn.Module):
    """As timm's: probabilities go through ``attn_drop`` unless attention is fused."""

    def __init__(self) -> None:
        super().__init__()
        self.fused_attn = True
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.fused_attn else self.attn_drop(x)


def transformer(*others: str) -> nn.Module:
    model = holding("patch_embed", "norm", "fc_norm", "head", *(f"blocks.{i}.norm1" for i in range(11)), *others)
    for block in model.get_submodule("blocks").children():
        block.attn = Timm()
    return model


def test_blocks_tokens_and_pool_of_a_transformer_of_timm() -> None:
    blocks = {f"block{i + 1}": f"blocks.{i}" for i in range(11)}
    assert of_timm.taps(transformer()) == blocks | {"tokens": "norm", "pool": "fc_norm"}
    assert "pool" not in of_timm.taps(transformer("head_dist"))


def test_attention_of_timm_is_named_where_it_runs_as_a_module() -> None:
    model = transformer()
    model.get_submodule("blocks.4.attn").fused_attn = False
    assert [name for name in of_timm.taps(model) if "attention" in name] == ["attention5"]
    assert of_timm.explicit_attention(model) is model
    found = of_timm.taps(model, "net")
    assert found["attention11"] == "net.blocks.10.attn.attn_drop" and found["block1"] == "net.blocks.0"
    ran: list[Any] = []
    model.get_submodule("blocks.10.attn.attn_drop").register_forward_hook(lambda *args: ran.append(args))
    model.get_submodule("blocks.10.attn")(torch.ones(1))
    assert ran


@pytest.mark.parametrize("taps", [of_timm.taps, of_torchvision.taps])
@pytest.mark.parametrize("paths", [("layers.0.blocks.0", "head.fc"), ("stem", "stages.0", "head.linear")])
def test_models_of_other_families_are_refused(taps: Callable[[nn.Module], Any], paths: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="Module has none of the modules of t") as refused:
        taps(holding(*paths))
    assert "named_modules()" in refused.value.hint


def test_layers_of_a_resnet_of_torchvision() -> None:
    model = holding("conv1", *LAYERS, "layer1.0.conv1", "avgpool", "fc")
    assert of_torchvision.taps(model) == stages(*LAYERS) | {"pool": "avgpool"}
    assert of_torchvision.taps(model, "a.b")["stage3"] == "a.b.layer3"


HALVED: list[tuple[nn.Module, dict[str, str]]] = [
    (  # a MobileNetV2: its head is the last of the features, and it pools by a function
        features(conv(3, 2), conv(3), conv(3, 2), conv(3), conv(3), conv(3, 2), conv(3), conv(1), pool=False),
        stages("features.1", "features.4", "features.6") | {"pool": "features"},
    ),
    (  # a small MobileNetV3: the first block halves at once
        features(conv(3, 2), conv(3, 2), conv(3), conv(1)),
        stages("features.0", "features.2") | {"pool": "avgpool"},
    ),
    (  # an EfficientNet: stages are sequences, and some do not halve
        features(
            conv(3, 2), nn.Sequential(conv(3)), nn.Sequential(conv(5, 2), conv(5)), nn.Sequential(conv(5)),
            nn.Sequential(nn.Sequential(conv(1), conv(3, 2)), conv(3)), conv(1),
        ),
        stages("features.1", "features.3", "features.4") | {"pool": "avgpool"},
    ),
    (  # a ConvNeXt: modules between the stages halve
        features(conv(4, 4), nn.Sequential(conv(7)), conv(2, 2), nn.Sequential(conv(7), conv(7))),
        stages("features.1", "features.3") | {"pool": "avgpool"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "expected"), HALVED)
def test_stages_of_torchvision_end_where_the_resolution_changes(model: nn.Module, expected: dict[str, str]) -> None:
    assert of_torchvision.taps(model) == expected


class Layer(nn.Module):
    """As torchvision's encoder: called without weights, fused."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attention(query=x, key=x, value=x, need_weights=False)[0]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.Sequential()
        for i in range(11):
            self.encoder.layers.add_module(f"encoder_layer_{i}", Layer())
        self.encoder.ln = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.ln(self.encoder.layers(x))


def test_written_out_attention_computes_the_same_and_can_be_tapped() -> None:
    torch.manual_seed(0)
    model, x = Transformer().double().eval(), torch.randn(2, 5, 12, dtype=torch.float64)
    nn.init.normal_(model.encoder.layers[0].self_attention.in_proj_bias)
    before, state = model(x), model.state_dict()
    weights = model.encoder.layers[0].self_attention(x, x, x, average_attn_weights=False)[1]
    assert "attention1" not in of_torchvision.taps(model)
    assert of_torchvision.explicit_attention(model) is model
    named = of_torchvision.taps(model)
    assert [named[name] for name in ("block11", "tokens")] == ["encoder.layers.encoder_layer_10", "encoder.ln"]
    assert named["attention1"] == "encoder.layers.encoder_layer_0.self_attention.softmax" and "attention11" in named
    assert list(model.state_dict()) == list(state)
    found: list[Tensor] = []
    model.get_submodule(named["attention1"]).register_forward_hook(lambda *args: found.append(args[2]))
    assert torch.allclose(model(x), before, atol=1e-12) and torch.allclose(found[0], weights, atol=1e-12)


def test_written_out_attention_drops_probabilities_in_training() -> None:
    attention = ExplicitAttention(nn.MultiheadAttention(12, 3, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, 12)
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    assert torch.equal(attention.eval()(x, x, x)[0], attention(x, x, x)[0])
    assert not ExplicitAttention(nn.MultiheadAttention(12, 3, batch_first=True).eval()).training


@pytest.mark.parametrize(
    "other",
    [{"batch_first": False}, {"kdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}],
)
def test_attention_that_is_no_plain_self_attention_is_refused(other: dict[str, Any]) -> None:
    original = nn.MultiheadAttention(12, 3, **{"batch_first": True} | other)
    with pytest.raises(UsageError, match="only plain self-attention"):
        ExplicitAttention(original)
    attention, x = ExplicitAttention(nn.MultiheadAttention(12, 3, batch_first=True)), torch.randn(2, 5, 12)
    for key, value, need in ((x, x.clone(), False), (x.clone(), x, False), (x, x, True)):
        with pytest.raises(ValueError, match="one tensor as query, key and value"):
            attention(x, key, value, need)


def runs(model: nn.Module, named: dict[str, str], size: int) -> dict[str, Tensor]:
    """The outputs of the named modules, each of which must run once in a pass and give a tensor [B, ...]."""
    outputs: list[tuple[str, Tensor]] = []
    for name, path in named.items():
        model.get_submodule(path).register_forward_hook(lambda _, __, output, n=name: outputs.append((n, output)))
    with torch.inference_mode():
        model.eval()(torch.randn(2, 3, size, size))
    assert sorted(name for name, _ in outputs) == sorted(named) and all(x.shape[0] == 2 for _, x in outputs)
    return dict(outputs)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv2_050", "mobilenetv3_small_050", "efficientnet_lite0", "convnext_atto"]
)
def test_convolutional_models_of_timm_itself(name: str) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = timm.create_model(name, num_classes=7)
    found = runs(model, of_timm.taps(model), 64)
    channels = [info["num_chs"] for info in timm.create_model(name, features_only=True).feature_info]
    assert "stage4" in found and "pool" in found
    assert {x.shape[1] for key, x in found.items() if key != "pool"} >= set(channels[1:])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_transformers_of_timm_itself(name: str) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = of_timm.explicit_attention(timm.create_model(name, img_size=32, depth=2))
    found = runs(model, of_timm.taps(model), 32)
    tokens = 6 if "distilled" in name else 5
    assert found["attention2"].shape == (2, 3, tokens, tokens) and found["tokens"].shape == (2, tokens, 192)
    assert torch.allclose(found["attention1"].sum(3), torch.ones(2, 3, tokens), atol=1e-5)
    assert ("pool" in found) == ("distilled" not in name)


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet18", "layer4"), ("mobilenet_v2", "features.17"), ("mobilenet_v3_small", "features.11"),
        ("efficientnet_b0", "features.7"), ("convnext_tiny", "features.7"),
    ],
)  # fmt: skip
def test_convolutional_models_of_torchvision_itself(name: str, last: str) -> None:
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = getattr(models, name)()
    named = of_torchvision.taps(model)
    found = runs(model, named, 64)
    sides = [x.shape[3] for key, x in found.items() if key != "pool"]
    assert named[f"stage{len(sides)}"] == last and sides == sorted(set(sides), reverse=True)


def test_a_transformer_of_torchvision_itself() -> None:
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    build = models.VisionTransformer
    model = of_torchvision.explicit_attention(
        build(image_size=32, patch_size=16, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96)
    )
    found = runs(model, of_torchvision.taps(model), 32)
    assert found["attention2"].shape == (2, 3, 5, 5) and found["tokens"].shape == (2, 5, 48)
