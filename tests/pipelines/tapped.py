"""A small conv net and a tiny transformer on noise, tapped in every way; students that are smaller."""

import numpy as np
import torch
from torch import nn

import ensemble_distill as ed

TAPS = (
    ed.Tap(member="c", module="stem", reduction="none"),
    ed.Tap(member="c", module="body"),
    ed.Tap(member="c", module="body", name="map", reduction="attention"),
    ed.Tap(member="c", module="body", name="map1", reduction=ed.Attention(p=1)),
    ed.Tap(member="c", module="body", name="gram", reduction="gram"),
    ed.Tap(member="c", module="body", name="random", reduction="flatten", project=ed.Random(dim=50, seed=4)),
    ed.Tap(member="c", module="body", name="body8", reduction="none", values="int8"),
    ed.Tap(member="c", module="twice", call=1),
    ed.Tap(member="c", module="head", input=0, reduction="flatten", values="int8"),
    ed.Tap(member="v", module="attention", output=0, reduction="tokens", values="bf16"),
    ed.Tap(member="v", module="attention", name="mean", output=1, reduction="attention_probs"),
    ed.Tap(member="v", module="attention", name="heads", output=1, reduction=ed.AttentionProbs(heads="keep")),
    ed.Tap(member="v", module="norm", reduction="cls"),
    ed.Tap(member="v", module="norm", name="tokens8", reduction="tokens", values="int8"),
    ed.Tap(member="v", module="norm", name="average", reduction="token_mean"),
)


class Conv(nn.Module):
    """Images uint8 [B, 1, 8, 8] to logits [B, 3]."""

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(width, width + 2, 3, padding=1)
        self.twice = nn.Conv2d(width + 2, width + 2, 1)
        self.head = nn.Linear(width + 2, 3)

    def forward(self, image):
        x = self.act(self.stem(image.float() / 16))
        x = self.twice(self.twice(self.body(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Tokens [B, T, D] to the same and the probabilities [B, 2, T, T]."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=2))
        probs = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
        return self.out((probs @ v).transpose(1, 2).flatten(2)), probs


class ViT(nn.Module):
    """Images uint8 [B, 1, 8, 8] as sixteen patches and a first token to logits [B, 3]."""

    def __init__(self, width=8):
        super().__init__()
        self.embed, self.first = nn.Conv2d(1, width, 2, stride=2), nn.Parameter(torch.randn(1, 1, width))
        self.attention, self.norm, self.head = Attention(width), nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, image):
        x = self.embed(image.float() / 16).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(x + self.attention(x)[0])[:, 0])


def seeded(make):
    torch.manual_seed(0)
    return make()


def data():
    chance = np.random.default_rng(0)
    images, labels = chance.integers(0, 17, (60, 1, 8, 8)).astype(np.uint8), chance.integers(0, 3, 60)
    parts = {"train": slice(0, 40), "test": slice(40, 60)}
    return ed.DataConfig(
        sources={name: ed.ArraySource({"image": images[part]}, labels[part]) for name, part in parts.items()},
        classes=("a", "b", "c"),
        views=ed.ViewsConfig(transforms=(ed.Crop(padding=2),)),
    )


def cache():
    members = (
        ed.Member(name="c", build=lambda: seeded(Conv)),
        ed.Member(name="v", build=lambda: seeded(ViT)),
    )
    return ed.CacheConfig(members=members, taps=TAPS, views=2, batch_size=16, unit_rows=20, precision="fp32")


def config(student, **terms):
    return ed.TrainConfig(
        student=student, objective={"soft": ed.SoftTargets(), **terms}, epochs=2, batch_size=10, precision="fp32"
    )


def train():
    def match(tap, module, **fields):
        return ed.FeatureMatch(tap=tap, module=module, distance="l2", **fields)

    return config(
        lambda: Conv(2),
        stem=match("tap/c.stem", "stem"),
        body=match("tap/c.body", "body"),
        map=match("tap/c.map", "body"),
        body8=match("tap/c.body8", "body", adapter="conv1x1"),
        random=match("tap/c.random", "body"),
        twice=match("tap/c.twice", "twice", call=0),
        head=match("tap/c.head", "head", input=0, reduction="flatten"),
        both=match(("tap/c.body", "tap/c.twice"), "body", combine="concat"),
        mean=match(("tap/c.body", "tap/c.twice"), "body", combine="mean"),
    )


def every():
    """Every kind of term that a convolutional student can have."""
    pool = {"tap": ("tap/c.body", "tap/v.norm"), "combine": "concat", "module": "body"}
    maps = {"tap": "tap/c.body8", "module": "body"}
    return config(
        lambda: Conv(2),
        hard=ed.HardLabels(weight=0.3),
        reverse=ed.ReverseKL(temperature=2),
        js=ed.JensenShannon(weight=ed.SwitchOff(value=1, after=0.5)),
        decoupled=ed.Decoupled(),
        dist=ed.Dist(),
        standardised=ed.Standardised(temperature=ed.Ramp(start=4, end=1)),
        hint=ed.FeatureMatch(**maps, distance=huber),
        factor=ed.FactorTransfer(**maps),
        attention=ed.AttentionTransfer(tap="tap/c.map", module="body", weight=ed.WarmUp(value=10, until=0.5)),
        activations=ed.AttentionTransfer(**maps),
        patterns=ed.NeuronSelectivity(**maps),
        gaussian=ed.VariationalInformation(**maps, weight=0.01),
        relations=ed.Relational(**pool),
        similarity=ed.SimilarityPreserving(**pool),
        congruence=ed.CorrelationCongruence(**pool),
        neighbours=ed.ProbabilisticTransfer(**pool),
        contrast=ed.Contrastive(**pool, size=5),
    )


def huber(student, cached, weights):
    return torch.nn.functional.huber_loss(student, cached)


def looks():
    return config(
        lambda: ViT(4),
        heads=ed.HeadAttention(tap="tap/v.heads", module="attention", output=1),
        mean=ed.HeadAttention(tap="tap/v.mean", module="attention", output=1, divergence="mse"),
    )


def small():
    def match(tap, module, **fields):
        return ed.FeatureMatch(tap=tap, module=module, **fields)

    return config(
        lambda: ViT(4),
        tokens=match("tap/v.attention", "attention", output=0),
        probs=match("tap/v.heads", "attention", output=1, adapter="identity"),
        mean=match("tap/v.mean", "attention", output=1),
        cls=match("tap/v.norm", "norm"),
        wide=match(("tap/v.attention", "tap/v.tokens8"), "norm", combine="concat"),
    )
