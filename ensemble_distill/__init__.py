"""Run an ensemble of teachers once; train any number of students from what they said."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ensemble_distill.cache.cache import Batch, Cache
    from ensemble_distill.cache.opening import open_cache
    from ensemble_distill.codec import Dense, Members, Sampled, TopK, VarOpt
    from ensemble_distill.config import (
        CacheConfig,
        DataConfig,
        EnsembleConfig,
        Member,
        OptimizerConfig,
        ScheduleConfig,
        Tap,
        TrainConfig,
    )
    from ensemble_distill.ensemble.distributions import LogProbs, TopKLogProbs
    from ensemble_distill.reduction import Attention, AttentionProbs, Random
    from ensemble_distill.schedules import Ramp, SwitchOff, WarmUp
    from ensemble_distill.sources.arrays import ArraySource
    from ensemble_distill.sources.idx import read_idx
    from ensemble_distill.targets import Targets
    from ensemble_distill.terms import (
        AttentionTransfer,
        Contrastive,
        CorrelationCongruence,
        Decoupled,
        Dist,
        FactorTransfer,
        FeatureMatch,
        HardLabels,
        HeadAttention,
        JensenShannon,
        NeuronSelectivity,
        ProbabilisticTransfer,
        Relational,
        ReverseKL,
        SimilarityPreserving,
        SoftTargets,
        Standardised,
        VariationalInformation,
    )
    from ensemble_distill.transforms import (
        ColorJitter,
        Crop,
        Custom,
        CutMix,
        Erase,
        Flip,
        Mixup,
        ResizedCrop,
        Rotate,
        ViewsConfig,
    )

# Names are imported when they are used, so that `import ensemble_distill` does not import torch.
_HOMES = {
    "cache.cache": ("Batch", "Cache"),
    "cache.opening": ("open_cache",),
    "codec": ("Dense", "Members", "Sampled", "TopK", "VarOpt"),
    "config": (
        "CacheConfig", "DataConfig", "EnsembleConfig", "Member", "OptimizerConfig", "ScheduleConfig", "Tap",
        "TrainConfig",
    ),
    "ensemble.distributions": ("LogProbs", "TopKLogProbs"),
    "reduction": ("Attention", "AttentionProbs", "Random"),
    "sources.arrays": ("ArraySource",),
    "sources.idx": ("read_idx",),
    "schedules": ("Ramp", "SwitchOff", "WarmUp"),
    "targets": ("Targets",),
    "terms": (
        "AttentionTransfer", "Contrastive", "CorrelationCongruence", "Decoupled", "Dist", "FactorTransfer",
        "FeatureMatch", "HardLabels", "HeadAttention", "JensenShannon", "NeuronSelectivity",
        "ProbabilisticTransfer", "Relational", "ReverseKL", "SimilarityPreserving", "SoftTargets", "Standardised",
        "VariationalInformation",
    ),
    "transforms": (
        "ColorJitter", "Crop", "Custom", "CutMix", "Erase", "Flip", "Mixup", "ResizedCrop", "Rotate", "ViewsConfig",
    ),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArraySource", "Attention", "AttentionProbs", "AttentionTransfer", "Batch", "Cache", "CacheConfig", "ColorJitter",
    "Contrastive", "CorrelationCongruence", "Crop", "Custom", "CutMix", "DataConfig", "Decoupled", "Dense", "Dist",
    "EnsembleConfig", "Erase", "FactorTransfer", "FeatureMatch", "Flip", "HardLabels", "HeadAttention",
    "JensenShannon", "LogProbs", "Member", "Members", "Mixup", "NeuronSelectivity", "OptimizerConfig",
    "ProbabilisticTransfer", "Ramp", "Random", "Relational", "ResizedCrop", "ReverseKL", "Rotate", "Sampled",
    "ScheduleConfig", "SimilarityPreserving", "SoftTargets", "Standardised", "SwitchOff", "Tap", "Targets", "TopK",
    "TopKLogProbs", "TrainConfig", "VarOpt", "VariationalInformation", "ViewsConfig", "WarmUp", "open_cache",
    "read_idx",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
