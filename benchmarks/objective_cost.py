"""What each objective adds to a training step: time with soft targets and the loss, over time with soft targets alone.

    python benchmarks/objective_cost.py --write docs/objective-cost.md

The student is the one of the Fashion-MNIST pipeline, batch 128, AdamW; what the cache would give is drawn once. Losses
of features act on the student's own feature maps, so that the backward pass goes through them. Losses of transformers
act on vectors of a small transformer's size that want a gradient: their figures are the cost of the loss alone. Both
steps are timed in turn, in one process, in processor time of one thread; the ratio is of neighbours.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ensemble_distill import losses
from ensemble_distill.targets import Targets

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "pipelines"))

from parts.resnet import ResNet  # noqa: E402

ROWS, CLASSES, TOKENS, WIDTH, TEACHER_WIDTH, HEADS = 128, 10, 64, 192, 384, 6
Loss = Callable[[Mapping[str, Tensor]], Tensor]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def learned(*modules: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(modules)


def objectives() -> dict[str, tuple[Loss, nn.ModuleList]]:
    """By name the loss of what the student says (logits and maps by name), and what it learns beside the student."""
    targets = Targets(torch.log_softmax(3 * drawn(ROWS, CLASSES), dim=1))
    labels, picked = torch.arange(ROWS) % CLASSES, torch.randint(0, 1000, (ROWS, 256))
    pooled, maps, earlier = drawn(ROWS, 128), drawn(ROWS, 128, 4, 4).relu(), drawn(ROWS, 64, 7, 7).relu()
    bank = drawn(1000, 128)
    wide, gaussian = losses.regressor(32, 128), losses.Gaussian(32, 128, positions=True)
    student_head, teacher_head = losses.Projection(32), losses.Projection(128)
    first, second = drawn(ROWS, 24, 7, 7), drawn(ROWS, 24, 7, 7)
    flow = losses.flow_matrix(first, second)
    teacher = tuple(drawn(3, ROWS, TOKENS, TEACHER_WIDTH))
    scores, hidden = drawn(ROWS, HEADS, TOKENS, TOKENS), drawn(ROWS, TOKENS, TEACHER_WIDTH)
    widen = losses.regressor(WIDTH, TEACHER_WIDTH)
    attention_map = losses.attention_map(earlier)

    def qkv() -> tuple[Tensor, Tensor, Tensor]:
        return tuple(drawn(3, ROWS, TOKENS, WIDTH).requires_grad_().unbind())  # type: ignore[return-value]

    none = learned()
    return {
        "soft_targets": (lambda s: s["logits"].new_zeros(()), none),
        "hard_labels": (lambda s: losses.hard_labels(s["logits"], labels), none),
        "reverse_kl": (lambda s: losses.reverse_kl(s["logits"], targets), none),
        "jensen_shannon": (lambda s: losses.jensen_shannon(s["logits"], targets), none),
        "decoupled": (lambda s: losses.decoupled(s["logits"], targets, labels, temperature=4), none),
        "dist": (lambda s: losses.dist(s["logits"], targets), none),
        "standardised": (lambda s: losses.standardised(s["logits"], targets), none),
        "feature_cosine": (lambda s: losses.feature_cosine(wide(s["pool"]), pooled), learned(wide)),
        "feature_l2": (lambda s: losses.feature_l2(wide(s["pool"]), pooled), learned(wide)),
        "attention_transfer": (
            lambda s: losses.attention_transfer(losses.attention_map(s["stage2"]), attention_map), none
        ),
        "rkd_distance": (lambda s: losses.rkd_distance(s["pool"], pooled), none),
        "rkd_angle": (lambda s: losses.rkd_angle(s["pool"], pooled), none),
        "similarity_preserving": (
            lambda s: losses.similarity_preserving(s["stage3"].flatten(1), maps.flatten(1)), none
        ),
        "correlation_congruence": (lambda s: losses.correlation_congruence(s["pool"], pooled), none),
        "pkt": (lambda s: losses.pkt(s["pool"], pooled), none),
        "crd, 256 negatives": (
            lambda s: losses.crd(student_head(s["pool"]), teacher_head(bank), torch.arange(ROWS), picked, 60_000),
            learned(student_head, teacher_head),
        ),
        "vid": (lambda s: losses.vid(*gaussian(s["stage3"]), maps), learned(gaussian)),
        "nst": (lambda s: losses.nst(s["stage3"], maps), none),
        "fsp": (lambda s: losses.fsp(losses.flow_matrix(s["stage2"], s["stage2"]), flow), none),
        "factor_transfer": (lambda s: losses.factor_transfer(s["stage3"], maps[:, :32]), none),
        "head_attention": (
            lambda s: losses.head_attention(
                torch.softmax(scores.clone().requires_grad_(), dim=3), torch.softmax(scores, dim=3)
            ), none,
        ),
        "tinybert_hidden": (lambda s: losses.tinybert_hidden(widen(qkv()[0]), hidden), learned(widen)),
        "tinybert_attention": (lambda s: losses.tinybert_attention(scores.clone().requires_grad_(), scores), none),
        "minilm": (lambda s: losses.minilm(qkv(), teacher, HEADS), none),
        "minilm_v2, 6 heads": (lambda s: losses.minilm_v2(qkv(), teacher, HEADS), none),
        "minilm_v2, 24 heads": (lambda s: losses.minilm_v2(qkv(), teacher, 24), none),
    }  # fmt: skip


class Step:
    """One training step: forward, soft targets and one more loss, backward, AdamW."""

    def __init__(self, loss: Loss, more: nn.ModuleList) -> None:
        torch.manual_seed(0)
        self.student = ResNet((16, 24, 32), CLASSES, first_stride=2)
        self.said: dict[str, Tensor] = {}
        for name in (*self.student.stages, "pool"):
            self.student.get_submodule(name).register_forward_hook(self._keep(name))
        self.loss = loss
        self.optimizer = torch.optim.AdamW([*self.student.parameters(), *more.parameters()])
        self.images = torch.randint(0, 256, (ROWS, 1, 28, 28), dtype=torch.uint8)
        self.targets = Targets(torch.log_softmax(3 * drawn(ROWS, CLASSES), dim=1))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self.said[name] = output

        return hook

    def seconds(self) -> float:
        start = time.process_time()
        self.said["logits"] = self.student(self.images)
        total = losses.soft_targets(self.said["logits"], self.targets, 4) + self.loss(self.said)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # processor time is then the same on a busy machine
    found = objectives()
    alone = Step(*found["soft_targets"])
    rows = []
    for name, (loss, more) in found.items():
        step, times, ratios = Step(loss, more), [], []
        for repetition in range(args.repetitions + 1):
            base, own = alone.seconds(), step.seconds()
            if repetition:  # the first one warms up
                times.append(1000 * (own - base))
                ratios.append(own / base)
        quarters = statistics.quantiles(ratios, n=4)
        rows.append(
            f"| `{name}` | {quarters[1]:.2f} | {quarters[0]:.2f}–{quarters[2]:.2f} | {statistics.median(times):.1f} |"
        )
        print(rows[-1], flush=True)
    command = shlex.join(["python", "benchmarks/objective_cost.py", *sys.argv[1:]])
    if args.write:
        args.write.write_text(page(rows, command))


def page(rows: list[str], command: str) -> str:
    return f"""# What objectives cost

A training step with soft targets and the loss, over a step with soft targets alone, in processor time of one thread:
batch {ROWS}, the student of the Fashion-MNIST pipeline, AdamW. Teacher features: pooled [128], maps [128, 4, 4], CRD's
bank of 1000 rows. Losses of transformers act on {TOKENS} tokens, student width {WIDTH}, teacher width {TEACHER_WIDTH},
{HEADS} heads, which no step of this student has: there the last column counts, and not the ratio. Medians of ratios of
neighbouring steps in one run, and their quartiles. The first row is soft targets alone against itself. Written by

    {command}

on {cpu()}, torch {torch.__version__}.

| loss | ratio, median | quartiles | added, ms |
|---|---|---|---|
{chr(10).join(rows)}
"""


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return f"{names[0].split(':')[1].strip() if names else platform.processor()} ({platform.machine()})"


if __name__ == "__main__":
    main()
