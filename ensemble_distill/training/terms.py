"""Which loss a term is: calls the free functions of ``losses`` with what the term says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensemble_distill import losses, terms
from ensemble_distill.cache.cache import Batch
from ensemble_distill.errors import UsageError
from ensemble_distill.schedules import at
from ensemble_distill.targets import Targets
from ensemble_distill.training.adapters import Projections
from ensemble_distill.training.unchanged import unchanged

_DISTANCES = {"cosine": losses.feature_cosine, "l2": losses.feature_l2}


def of_logits(
    term: terms.AnyTerm,
    logits: Tensor,
    targets: Targets,
    batch: Batch,
    weights: Tensor | None,
    progress: float,
) -> Tensor:
    """A term's loss of logits [B, C], a scalar. ``weights`` float32 [B] or None; ``progress`` from 0 to 1."""
    if isinstance(term, terms.HardLabels):
        return _of_labels(term, logits, batch, weights)
    assert isinstance(term, terms.Tempered)
    temperature = at(term.temperature, progress)
    match term:
        case terms.SoftTargets():
            return losses.soft_targets(logits, targets, temperature, weights)
        case terms.ReverseKL():
            return losses.reverse_kl(logits, targets, temperature, weights)
        case terms.JensenShannon():
            return losses.jensen_shannon(logits, targets, term.beta, temperature, weights)
        case terms.Decoupled():
            assert batch.labels is not None
            labels = batch.labels.to(logits.device)
            return losses.decoupled(logits, targets, labels, term.alpha, term.beta, temperature, weights)
        case terms.Dist():
            return losses.dist(logits, targets, term.beta, term.gamma, temperature)
        case terms.Standardised():
            return losses.standardised(logits, targets, temperature, weights)
    raise TypeError(f"no loss is known for {type(term).__name__}")


def of_features(
    term: terms.FeatureTerm,
    learned: nn.Module | None,
    student: Tensor,
    cached: Tensor,
    weights: Tensor | None,
    mask_BT: Tensor | None = None,
) -> Tensor:
    """A term's loss of two features float32 [B, ...], a scalar; ``learned`` is what ``learn`` made for it.

    ``mask``: of a ragged cached feature, bool [B, T]. Then the student's tokens that are not real are zero too, and
    compared with nothing. UsageError where it has another number of tokens.
    """
    if isinstance(term, terms.Adapted) and learned is not None:
        student = learned(student)
    if mask_BT is not None:
        student = _of_real_tokens(student, mask_BT)
    match term:
        case terms.FeatureMatch():
            if callable(term.distance):
                more = () if mask_BT is None else (mask_BT,)
                with unchanged("its distance", student, cached, weights, mask_BT):
                    return _scalar(term.distance(student, cached, weights, *more))
            return _DISTANCES[term.distance](student.flatten(1), cached.flatten(1), weights)
        case terms.FactorTransfer():
            return losses.factor_transfer(student, cached, weights)
        case terms.AttentionTransfer():
            return losses.attention_transfer(_map(student, term.p), _map(cached, term.p), term.squared, weights)
        case terms.HeadAttention():
            return losses.head_attention(_heads(student), _heads(cached), term.divergence, weights=weights)
        case terms.NeuronSelectivity():
            return losses.nst(student, cached, weights=weights)
        case terms.VariationalInformation():
            assert learned is not None
            mean, variance = learned(student)
            return losses.vid(mean, variance, cached, weights)
        case terms.Contrastive():
            assert isinstance(learned, Projections)
            return _contrastive(term, learned, student.flatten(1), cached.flatten(1), weights)
        case _:
            return _of_relations(term, student.flatten(1), cached.flatten(1))


def _of_relations(term: terms.FeatureTerm, student: Tensor, cached: Tensor) -> Tensor:
    match term:
        case terms.Relational():
            distance = losses.rkd_distance(student, cached) if term.distance > 0 else 0
            angle = losses.rkd_angle(student, cached) if term.angle > 0 else 0
            return term.distance * distance + term.angle * angle + student.new_zeros(())
        case terms.SimilarityPreserving():
            return losses.similarity_preserving(student, cached)
        case terms.CorrelationCongruence():
            return losses.correlation_congruence(student, cached, term.gamma, term.order)
        case terms.ProbabilisticTransfer():
            return losses.pkt(student, cached)
    raise TypeError(f"no loss is known for {type(term).__name__}")


def _of_labels(term: terms.HardLabels, logits: Tensor, batch: Batch, weights: Tensor | None) -> Tensor:
    """Cross-entropy with the labels of a batch; where its samples are mixed, with both labels by their shares."""
    assert batch.labels is not None
    labels, partners = batch.labels.to(logits.device), batch.partners
    if partners is None:
        return losses.hard_labels(logits, labels, term.label_smoothing, weights)
    assert partners.labels is not None
    others, lam = partners.labels.to(logits.device), partners.lam.to(logits.device)
    return losses.mixed_labels(logits, labels, others, lam, term.label_smoothing, weights)


def _contrastive(
    term: terms.Contrastive, learned: Projections, student_BD: Tensor, cached_BE: Tensor, weights: Tensor | None
) -> Tensor:
    """Each row against its own cached feature and those of all other rows of the batch."""
    student, bank = learned(student_BD, cached_BE)
    own = torch.arange(len(bank), device=bank.device)
    others = (own[:, None] + torch.arange(1, len(bank), device=bank.device)) % len(bank)
    return losses.crd(student, bank, own, others, temperature=term.temperature, weights=weights)


def _map(feature: Tensor, p: float) -> Tensor:
    """An attention map [B, N]: of activations [B, C, H, W], or as it was taken [B, H, W]."""
    return losses.attention_map(feature, p) if feature.ndim == 4 else feature.flatten(1)


def _heads(probs: Tensor) -> Tensor:
    """[B, heads, T, T]; what is [B, T, T] has been averaged over its heads."""
    return probs[:, None] if probs.ndim == 3 else probs


def _of_real_tokens(student: Tensor, mask_BT: Tensor) -> Tensor:
    """Tokens [B, T, D] with zeros where none is real; what has no tokens [B, D] is as it was."""
    if student.ndim == 2:
        return student
    if student.ndim != 3 or student.shape[:2] != mask_BT.shape:
        raise UsageError(
            f"the cached feature has {mask_BT.shape[1]} tokens a row, of which some are real, "
            f"and the student's the shape {list(student.shape[1:])}",
            hint="choose a module of as many tokens, with the reduction tokens",
        )
    return student.masked_fill(~mask_BT[:, :, None], 0)


def _scalar(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0:
        found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(f"its distance gave {found}, expected a scalar tensor")
    return value
