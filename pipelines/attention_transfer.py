"""Attention transfer: residual networks to a small one (Zagoruyko & Komodakis 2017), transformers to a small one.

ensemble-distill cache pipelines/attention_transfer.py --out caches/all --limit 20000
ensemble-distill train pipelines/attention_transfer.py --cache caches/all --out runs/attention --limit 20000
ensemble-distill train pipelines/attention_transfer.py:vit --cache caches/all --out runs/vit --limit 20000
"""

import ensemble_distill as ed
from parts.one_cache import SOFT, VITS, cache, data, every, taught
from parts.one_cache import vit as small_vit

__all__ = ["cache", "data", "train", "vit", "vit_soft"]

MIDDLE = ed.AttentionTransfer(tap=every("stage2_attention"), module="stage1", weight=1000)
LAST = ed.AttentionTransfer(tap=every("stage3_attention"), module="stage2", weight=1000)
HEADS = ed.HeadAttention(tap=every("attention", VITS), module="blocks.1.attention.softmax", weight=1)


def train() -> ed.TrainConfig:
    """Where the four residual networks are active, on average, at two resolutions."""
    return taught(SOFT | {"middle": MIDDLE, "last": LAST})


def vit() -> ed.TrainConfig:
    """Where the last blocks of the two transformers look, on average."""
    return taught(SOFT | {"heads": HEADS}, small_vit)


def vit_soft() -> ed.TrainConfig:
    """The same transformer from soft targets and labels."""
    return taught(SOFT, small_vit)
