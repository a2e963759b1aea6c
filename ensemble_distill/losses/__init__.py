"""Losses: free functions of tensors and ``Targets``, in nats, mean over rows. Suffixes: see targets.py."""

from ensemble_distill.losses.attention import attention_map, attention_transfer, head_attention
from ensemble_distill.losses.contrastive import Projection, crd
from ensemble_distill.losses.decoupled import decoupled
from ensemble_distill.losses.dist import dist
from ensemble_distill.losses.factor import factor_transfer
from ensemble_distill.losses.features import feature_cosine, feature_l2, regressor
from ensemble_distill.losses.flow import flow_matrix, fsp
from ensemble_distill.losses.logits import forward_kl, hard_labels, jensen_shannon, reverse_kl, soft_targets
from ensemble_distill.losses.minilm import minilm, minilm_relation, minilm_v2
from ensemble_distill.losses.mixed import mixed_labels
from ensemble_distill.losses.relations import rkd_angle, rkd_distance
from ensemble_distill.losses.selectivity import nst
from ensemble_distill.losses.similarity import correlation_congruence, pkt, similarity_preserving
from ensemble_distill.losses.standardised import standardised
from ensemble_distill.losses.tinybert import tinybert_attention, tinybert_hidden, uniform_layers
from ensemble_distill.losses.variational import Gaussian, vid

__all__ = [
    "Gaussian", "Projection", "attention_map", "attention_transfer", "correlation_congruence", "crd", "decoupled",
    "dist", "factor_transfer", "feature_cosine", "feature_l2", "flow_matrix", "forward_kl", "fsp", "hard_labels",
    "head_attention", "jensen_shannon", "minilm", "minilm_relation", "minilm_v2", "mixed_labels", "nst", "pkt",
    "regressor", "reverse_kl", "rkd_angle", "rkd_distance", "similarity_preserving", "soft_targets", "standardised",
    "tinybert_attention", "tinybert_hidden", "uniform_layers", "vid",
]  # fmt: skip
