"""A small transformer on texts of varying length, padded to eleven tokens; its real tokens are tapped."""

import numpy as np
import torch
from torch import nn

import ensemble_distill as ed

TOKENS, WIDTH, TRAIN = 11, 6, 50

TAPS = (
    ed.Tap(member="t", module="norm", reduction="tokens", mask="mask"),
    ed.Tap(member="t", module="norm", name="bf16", reduction="tokens", mask="mask", values="bf16"),
    ed.Tap(member="t", module="norm", name="int8", reduction="tokens", mask="mask", values="int8"),
    ed.Tap(member="t", module="embed", name="padded", reduction="tokens"),
    ed.Tap(member="t", module="embed", reduction="tokens", mask="mask"),
    # one more
)


class Text(nn.Module):
    """Tokens int64 [B, T] and their mask [B, T] to logits [B, 3]; ``fill`` is what other than real tokens become."""

    def __init__(self, width, fill=0.0):
        super().__init__()
        self.fill = fill
        self.embed, self.mix, self.norm = nn.Embedding(20, width), nn.Linear(width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids, mask):
        real = mask[:, :, None] != 0
        x = self.embed(ids)
        mean = (x * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        x = self.norm((self.mix(x) + mean).masked_fill(~real, self.fill))
        return self.head(x.masked_fill(~real, 0).sum(1))


def seeded(make):
    torch.manual_seed(0)
    return make()


def source(rows, seed):
    """Real tokens anywhere in a row; a first row of none, and one of all."""
    chance = np.random.default_rng(seed)
    ids, labels = chance.integers(0, 20, (90, TOKENS)), chance.integers(0, 3, 90)
    mask = chance.random((90, TOKENS)) < chance.random((90, 1)) * 0.7
    mask[0], mask[7] = False, True
    return ed.ArraySource({"ids": ids[:rows], "mask": 3 * mask[:rows].astype(np.int64)}, labels[:rows])


def data():
    return ed.DataConfig(sources={"train": source(TRAIN, 0), "test": source(15, 1)}, classes=("a", "b", "c"))


def cache():
    member = ed.Member(name="t", build=lambda: seeded(lambda: Text(WIDTH, torch.nan)))
    return ed.CacheConfig(members=(member,), taps=TAPS, batch_size=8, unit_rows=20, precision="fp32")


def hidden(student, cached, weights, mask):
    return ed.losses.tinybert_hidden(student, cached, mask, weights)


def train():
    return ed.TrainConfig(
        student=lambda: Text(4),
        objective={
            "soft": ed.SoftTargets(),
            "hidden": ed.FeatureMatch(tap="tap/t.norm", module="embed", distance=hidden),
            "cosine": ed.FeatureMatch(tap=("tap/t.bf16", "tap/t.int8"), module="embed", combine="concat"),
            "pooled": ed.SimilarityPreserving(tap="tap/t.embed", module="embed", reduction="token_mean"),
        },
        epochs=2, batch_size=10, precision="fp32",
    )  # fmt: skip
