"""What an objective is made of, as data. No torch: losses stand in losses/, who calls them in training/terms.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ensemble_distill.frozen import Config
from ensemble_distill.reduction import ModulePath, Place, Reduction, Take
from ensemble_distill.schedules import Scheduled, ends


def _from_zero(weight: Scheduled) -> Scheduled:
    if ends(weight)[0] < 0:
        raise ValueError("expected a weight of 0 or more")
    return weight


def _above_zero(temperature: Scheduled) -> Scheduled:
    if ends(temperature)[0] <= 0:
        raise ValueError("expected a temperature above 0, at every point of the training")
    return temperature


Weight = Annotated[Scheduled, AfterValidator(_from_zero)]
Temperature = Annotated[Scheduled, AfterValidator(_above_zero)]
Adapter = Literal["auto", "linear", "conv1x1", "identity"]


class AnyTerm(Config):
    """What every term has: a weight in the sum, constant or scheduled, and who of the rows takes part.

    ``rows``: a function of a batch's ``Targets`` that gives a weight ≥ 0 for each row, float [B], for this term alone.
    """

    weight: Weight = 1.0
    rows: Callable[[Any], Any] | None = None

    needs_labels: ClassVar[bool] = False
    compares_rows: ClassVar[bool] = False

    @property
    def least_rows(self) -> int:
        """The smallest batch that it is defined for."""
        return 2 if self.compares_rows else 1

    @model_validator(mode="after")
    def _rows_by_themselves(self) -> Self:
        if self.compares_rows and self.rows is not None:
            raise ValueError("it compares rows with each other: a pair belongs to two rows, and has no row's weight")
        return self


# Of logits ------------------------------------------------------------------------------------------


class HardLabels(AnyTerm):
    """Cross-entropy with the labels."""

    kind: Literal["hard_labels"] = "hard_labels"
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    needs_labels: ClassVar[bool] = True


class Tempered(AnyTerm):
    """A term on predictions at a temperature T, constant or annealed; its loss is multiplied by T²."""

    temperature: Temperature = 1.0


class SoftTargets(Tempered):
    """T² KL(p_T ‖ q_T) to the ensemble's predictions."""

    kind: Literal["soft_targets"] = "soft_targets"


class ReverseKL(Tempered):
    """T² KL(q_T ‖ p_T)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(Tempered):
    """T² [β KL(p ‖ m) + (1 − β) KL(q ‖ m)], m = β p + (1 − β) q."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"
    beta: float = Field(0.5, gt=0, lt=1)


class Decoupled(Tempered):
    """DKD: T² (α TCKD + β NCKD), how sure of the label, and what of all other classes."""

    kind: Literal["decoupled"] = "decoupled"
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(8.0, ge=0)
    temperature: Temperature = 4.0

    needs_labels: ClassVar[bool] = True


class Dist(Tempered):
    """DIST: correlations of probabilities, of each row (``beta``) and of each class over the batch (``gamma``)."""

    kind: Literal["dist"] = "dist"
    beta: float = Field(1.0, ge=0)
    gamma: float = Field(1.0, ge=0)

    compares_rows: ClassVar[bool] = True


class Standardised(Tempered):
    """Soft targets of standardised logits."""

    kind: Literal["standardised"] = "standardised"
    temperature: Temperature = 2.0


# Of features ----------------------------------------------------------------------------------------


class FeatureTerm(AnyTerm):
    """What every term on features has: cached taps, and a module of the student.

    ``tap``: one, or several of one shape, which are put together as ``combine`` says: their mean, or their channels
    side by side. ``reduction``, ``output``, ``input``, ``call``: of the student's module, as in ``Tap``; the reduction
    is by default that of the (first) tap.
    """

    tap: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=64)]
    module: ModulePath
    combine: Literal["mean", "concat"] = "mean"
    reduction: Reduction | None = None
    output: Place | None = None
    input: Place | None = None
    call: Place | None = None

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,) if isinstance(self.tap, str) else self.tap

    def take(self, default: Reduction) -> Take:
        """What is taken of the student, with the reduction of the cached tap where none is stated."""
        reduction = self.reduction or default
        return Take(module=self.module, reduction=reduction, output=self.output, input=self.input, call=self.call)

    @model_validator(mode="after")
    def _takes(self) -> Self:
        self.take("pool")
        return self


class Adapted(FeatureTerm):
    """A term on features of one shape.

    ``adapter``: from the student's shape to the cached one; ``auto`` is none where they agree, else ``conv1x1`` for
    maps and ``linear`` over the last axis.
    """

    adapter: Adapter = "auto"


class FeatureMatch(Adapted):
    """Pull a student's feature towards a cached tap (FitNets' hint with ``distance="l2"``).

    ``distance``: ``cosine``, ``l2`` (½ ‖t − s‖², of all of a row's feature), or a function of one's own, (student,
    cached, weights) -> scalar, of two float32 [B, ...] of one shape and the rows' weights float32 [B] or None. Of a
    ragged tap it is given a fourth argument: the mask bool [B, T], true on the real tokens.
    """

    kind: Literal["feature"] = "feature"
    distance: Literal["cosine", "l2"] | Callable[..., Any] = "cosine"


class FactorTransfer(Adapted):
    """‖F_T/‖F_T‖ − F_S/‖F_S‖‖₁; the adapter is the student's translator."""

    kind: Literal["factor_transfer"] = "factor_transfer"


class AttentionTransfer(FeatureTerm):
    """Where a convolutional network is active: maps Σ_c |A_c|^p of one height and width, each divided by its norm.

    The tap holds such maps (``reduction=Attention(p)``), or activations [C, H, W], of which they are made here.
    """

    kind: Literal["attention_transfer"] = "attention_transfer"
    p: float = Field(2.0, ge=1, le=16)
    squared: bool = True


class HeadAttention(FeatureTerm):
    """Where a transformer looks: attention probabilities of as many tokens (``AttentionProbs``), heads averaged."""

    kind: Literal["head_attention"] = "head_attention"
    divergence: Literal["kl", "mse"] = "kl"


class NeuronSelectivity(FeatureTerm):
    """NST: what the channels of two maps [C, H, W] of one height and width respond to."""

    kind: Literal["neuron_selectivity"] = "neuron_selectivity"


class VariationalInformation(FeatureTerm):
    """VID: how well Gaussians about a learned map of the student's feature predict each channel of the cached one."""

    kind: Literal["variational_information"] = "variational_information"
    initial: float = Field(5.0, gt=1e-4)


class Relational(FeatureTerm):
    """RKD: ``distance`` times that of relative distances, plus ``angle`` times that of angles, between rows."""

    kind: Literal["relational"] = "relational"
    distance: float = Field(1.0, ge=0)
    angle: float = Field(2.0, ge=0)

    compares_rows: ClassVar[bool] = True

    @property
    def least_rows(self) -> int:
        return 3 if self.angle > 0 else 2


class SimilarityPreserving(FeatureTerm):
    """SP: the rows' similarities, each row of them divided by its norm."""

    kind: Literal["similarity_preserving"] = "similarity_preserving"

    compares_rows: ClassVar[bool] = True


class CorrelationCongruence(FeatureTerm):
    """CC: a Gaussian kernel of the rows' directions, by its series up to ``order`` (None: the kernel itself)."""

    kind: Literal["correlation_congruence"] = "correlation_congruence"
    gamma: float = Field(0.4, gt=0)
    order: int | None = Field(2, ge=1, le=64)

    compares_rows: ClassVar[bool] = True


class ProbabilisticTransfer(FeatureTerm):
    """PKT: which rows are neighbours of which, as conditional probabilities."""

    kind: Literal["probabilistic_transfer"] = "probabilistic_transfer"

    compares_rows: ClassVar[bool] = True

    @property
    def least_rows(self) -> int:
        return 3


class Contrastive(FeatureTerm):
    """CRD within the batch, whose other rows are the negatives; both projections to ``size`` values are learned.

    ``temperature``: τ of the critic.
    """

    kind: Literal["contrastive"] = "contrastive"
    size: int = Field(128, ge=1, le=1 << 14)
    temperature: float = Field(0.1, gt=0)

    @property
    def least_rows(self) -> int:
        return 2


Term = Annotated[
    SoftTargets | HardLabels | ReverseKL | JensenShannon | Decoupled | Dist | Standardised | FeatureMatch
    | FactorTransfer | AttentionTransfer | HeadAttention | NeuronSelectivity | VariationalInformation | Relational
    | SimilarityPreserving | CorrelationCongruence | ProbabilisticTransfer | Contrastive,
    Field(discriminator="kind"),
]  # fmt: skip
