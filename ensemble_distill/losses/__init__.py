"""Losses: free functions of tensors and ``Targets``, in nats, mean over rows. Suffixes: see targets.py."""

from ensemble_distill.losses.features import feature_cosine, feature_l2
from ensemble_distill.losses.logits import forward_kl, hard_labels, jensen_shannon, reverse_kl, soft_targets
from ensemble_distill.losses.mixed import mixed_labels

__all__ = [
    "feature_cosine", "feature_l2", "forward_kl", "hard_labels", "jensen_shannon", "mixed_labels", "reverse_kl",
    "soft_targets",
]  # fmt: skip
