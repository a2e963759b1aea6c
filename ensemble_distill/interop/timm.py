"""Names of the modules that one usually taps in models of timm (extra: ``timm``), which is not imported here."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ensemble_distill.interop.names import numbered, present, under, unknown

Model = TypeVar("Model", bound=nn.Module)


def taps(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Usual names to module paths, for ``Tap(member, module)`` and ``FeatureMatch(module=...)``.

    ResNet, ConvNeXt, MobileNet, EfficientNet: ``stage1`` … ``stageN``, the stages' ends [B, C, h, w], and ``pool``
    [B, C] or [B, C, 1, 1]. ViT, DeiT: ``block1`` … ``blockN`` and, after the last norm, ``tokens`` [B, T, D]; ``pool``
    [B, D] unless there is a distillation token; ``attention1`` … ``attentionN``, probabilities [B, heads, T, T], of
    those blocks where attention is not fused: see ``explicit_attention``. ``prefix``: the path of the model within the
    module that is tapped. Raises UsageError for other models.
    """
    known = dict(model.named_modules())
    if "patch_embed" in known and "blocks.0.attn" in known:
        return under(prefix, _transformer(known))
    pool = present(known, pool="global_pool") or present(known, pool="head.global_pool")
    for pattern in (r"layer(\d+)", r"stages\.(\d+)", r"blocks\.(\d+)"):
        if pool and (stages := numbered(known, pattern, "stage")):
            return under(prefix, stages | pool)
    raise unknown(model, "timm's ResNet, MobileNet, EfficientNet, ViT, DeiT or ConvNeXt")


def explicit_attention(model: Model) -> Model:
    """The model itself, its attention no longer fused into one call, so that its probabilities can be tapped.

    The same function up to rounding, with T² probabilities a head and sample in memory.
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010 - mypy takes unknown attributes for modules
    return model


def _transformer(known: dict[str, nn.Module]) -> dict[str, str]:
    blocks = numbered(known, r"blocks\.(\d+)", "block")
    attention = {
        name.replace("block", "attention"): f"{path}.attn.attn_drop"
        for name, path in blocks.items()
        if f"{path}.attn.attn_drop" in known and not getattr(known[f"{path}.attn"], "fused_attn", True)
    }
    pool = {} if "head_dist" in known else present(known, pool="fc_norm")
    return blocks | attention | present(known, tokens="norm") | pool
