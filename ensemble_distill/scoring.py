"""How a student does on a split: its predictions against labels and against the ensemble."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ensemble_distill.device import Resolved, autocast, own, upload
from ensemble_distill.errors import UsageError
from ensemble_distill.losses import forward_kl
from ensemble_distill.metrics import accuracy, ece, nll
from ensemble_distill.targets import Targets


class Scorable(Protocol):
    """The part of a batch that scoring looks at."""

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def labels(self) -> Tensor | None: ...
    @property
    def targets(self) -> Targets | None: ...


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor], device: torch.device, precision: Resolved) -> Tensor:
    """The student's logits [B, C] in float32 for inputs by name, given to it in the order of the source."""
    with autocast(device, precision):
        output = model(*own(upload(x, device) for x in inputs.values()))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UsageError(f"the student gave a {type(output).__name__}, expected logits [batch, classes]")
    return logits.float()


@torch.inference_mode()
def score(
    model: nn.Module, batches: Iterable[Scorable], device: torch.device, precision: Resolved = "fp32"
) -> dict[str, float]:
    """accuracy, nll (nats), ece where there are labels; agreement and kl (nats) to the ensemble where cached."""
    was_training = model.training
    model.eval()
    logits, labels, kl, agree = [], [], [], []
    for batch in batches:
        said = logits_of(model, batch.inputs, device, precision).cpu()
        logits.append(said)
        if batch.labels is not None:
            labels.append(batch.labels)
        if batch.targets is not None:
            kl.append(forward_kl(said, batch.targets).double())
            agree.append(said.argmax(1) == batch.targets.top1())
    model.train(was_training)
    logprobs = torch.log_softmax(torch.cat(logits), dim=1)
    result: dict[str, float] = {}
    if labels:
        truth = torch.cat(labels)
        result |= {"accuracy": accuracy(logprobs, truth), "nll": nll(logprobs, truth), "ece": ece(logprobs, truth)}
    if kl:
        result |= {"agreement": float(torch.cat(agree).double().mean()), "kl": float(torch.cat(kl).mean())}
    return result
