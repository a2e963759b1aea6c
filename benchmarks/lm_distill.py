"""A small language model's student from caches of a thousandth of the bytes: does it lose anything?

    python benchmarks/lm_distill.py --write docs/lm-distill.md

SmolLM2 reads BBC news once; `ensemble-distill cache` keeps what it said with each codec; students that differ in the
codec alone are trained from each cache, three seeds, and held against the teacher's whole distributions on other
articles. What is finished in --folder is reused. Packages: see docs/codec-errors.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_teachers import CHUNK, LANGUAGE, lacking, language
from torch import Tensor, nn

from ensemble_distill import open_cache
from ensemble_distill.codec import Dense, HeadCodec, Sampled, TopK, VarOpt
from ensemble_distill.losses import hard_labels, soft_targets

PIPELINE = Path(__file__).with_name("lm_pipeline.py")
LABELS = "labels"  # the arm that has no teacher: the text's own next tokens
FROM = "varopt-32"  # the cache that serves the samples of that arm; its targets are not looked at

# Of 49,152 classes: three of 102 bytes a row, then three of 1,542. TopK without its normalisers, since T is 1.
ARMS: dict[str, HeadCodec | None] = {
    "dense": Dense(),
    "topk-32": TopK(k=32, temperatures=()),
    "varopt-32": VarOpt(k=32),
    "sampled-51": Sampled(n=51),
    LABELS: None,
    "topk-512": TopK(k=512, temperatures=()),
    "varopt-512": VarOpt(k=512),
    "sampled-771": Sampled(n=771),
}
EQUAL = (("varopt-32", "topk-32", "sampled-51"), ("varopt-512", "topk-512", "sampled-771"))
Scores = dict[str, float]


def capture(name: str, folder: Path) -> Path:
    """The cache of an arm, made by the command line unless it is there and sealed."""
    codec, out = ARMS[name], folder / "caches" / name
    if (out / "CURRENT").exists():
        return out
    assert codec is not None
    command = [
        *(sys.executable, "-m", "ensemble_distill", "cache", str(PIPELINE), "--out", str(out), "--quiet"),
        *("--set", f"codec={codec.model_dump_json(exclude={'classes'})}"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"LM_DISTILL": str(folder)})
    return out


def run(name: str, seed: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one student and score it; a file of the folder keeps what came out."""
    path = folder / "runs" / f"{name}-{seed}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    import lm_pipeline

    start = time.perf_counter()
    student = train(name, seed, lm_pipeline, folder, args)
    seconds = time.perf_counter() - start
    scores = score(student, lm_pipeline, args)
    result = {"arm": name, "seed": seed, "seconds": seconds, **scores}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    print(json.dumps(result), flush=True)
    return result


def train(name: str, seed: int, pipeline: Any, folder: Path, args: argparse.Namespace) -> nn.Module:
    """A student after --epochs epochs. Initial weights and order depend on the seed alone, not on the arm."""
    torch.manual_seed(seed)
    student = pipeline.train().student()
    cache = open_cache(folder / "caches" / (FROM if name == LABELS else name))
    source = pipeline.data().sources["train"]
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)
    steps = args.epochs * -(-len(source) // args.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20) * (1 - step / steps))
    for epoch in range(args.epochs):
        for batch in cache.loader(source, args.batch, epoch=epoch, seed=seed):
            with torch.autocast("cpu", torch.bfloat16):
                logits = student(**batch.inputs)
            assert batch.labels is not None
            loss = hard_labels(logits, batch.labels) if name == LABELS else soft_targets(logits, batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"{name}, seed {seed}, epoch {epoch + 1}: last loss {loss.item():.3f}", flush=True)
    return student


@torch.inference_mode()
def score(student: nn.Module, pipeline: Any, args: argparse.Namespace) -> Scores:
    """On the held-out chunks, against the teacher's whole distributions: means over positions, nats."""
    source = pipeline.source(args.chunks, args.chunks + args.held_out)
    sums, rows = {"kl": 0.0, "cross_entropy": 0.0, "text_nll": 0.0, "agreement": 0.0, "accuracy": 0.0}, len(source)
    teacher = pipeline.Lookup()
    for index in np.array_split(np.arange(rows), -(-rows // CHUNK)):
        inputs = {name: torch.from_numpy(x) for name, x in source.load(index).inputs.items()}
        labels = torch.from_numpy(source.labels[index])
        q, p = torch.log_softmax(student(**inputs).float(), dim=1), teacher(**inputs)
        for name, values in figures(p, q, labels).items():
            sums[name] += float(values.sum())
    return {name: value / rows for name, value in sums.items()}


def figures(p: Tensor, q: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What a student q says beside a teacher p (log-probabilities [B, V]): values [B] by name."""
    return {
        "kl": (p.exp() * (p - q)).sum(dim=1),
        "cross_entropy": -(p.exp() * q).sum(dim=1),
        "text_nll": -q.gather(1, labels[:, None])[:, 0],
        "agreement": (p.argmax(dim=1) == q.argmax(dim=1)).double(),
        "accuracy": (labels == q.argmax(dim=1)).double(),
    }


# The page -------------------------------------------------------------------------------------------


def row_bytes(name: str, classes: int) -> int:
    codec = ARMS[name]
    if codec is None:
        return 0
    arrays = type(codec).model_validate({**dict(codec), "classes": classes}).arrays()
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in arrays.values())


def spread(values: list[float], digits: int = 3, scale: float = 1) -> str:
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


COLUMNS = (
    "cache", "bytes", "seeds", "KL to the teacher, nats", "NLL of the text, nats", "same first token, %",
    "text's token first, %",
)  # fmt: skip


def line(name: str, runs: list[dict[str, Any]], classes: int) -> str:
    of = {key: [r[key] for r in runs] for key in ("kl", "text_nll", "agreement", "accuracy")}
    size = f"{row_bytes(name, classes):,}" if ARMS[name] else "–"
    percent = (spread(of["agreement"], 2, 100), spread(of["accuracy"], 2, 100))
    nats = (spread(of["kl"]), spread(of["text_nll"]))
    return "| " + " | ".join([name, size, str(len(runs)), *nats, *percent]) + " |"


def verdict(name: str, other: str, runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Whether an arm's KL is that of another within the spread; the difference of each seed, which shares all else."""
    own, theirs = runs[name], runs[other]
    seeds = sorted(set(own) & set(theirs))
    more = [own[s]["kl"] - theirs[s]["kl"] for s in seeds]
    differences = ", ".join(f"{d:+.3f}" for d in more)
    if len(seeds) < 2:
        return f"- {name} less {other}: {differences}; too few seeds to say more."
    wobble = sum(statistics.stdev(arm[s]["kl"] for s in seeds) for arm in (own, theirs))
    said = judgement(more, wobble, other)
    return f"- {name} less {other}: {differences}; {said} (the spreads of both together are {wobble:.3f})."


def judgement(more: list[float], wobble: float, other: str) -> str:
    """In words: by the spread over seeds, and by the sign, for runs of one seed are a pair."""
    mean, side = statistics.mean(more), "**worse**" if statistics.mean(more) > 0 else "better"
    if abs(mean) > wobble:
        return f"{side}, by {abs(mean):.3f}"
    each = f", but {side} in every seed" if min(more) > 0 or max(more) < 0 else ""
    return f"as good as {other} within the spread{each}, by {abs(mean):.3f} in the mean"


def verdicts(runs: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Each arm against dense, and those of equal bytes against each other."""
    done = [name for name in ARMS if runs[name]]
    pairs = [(name, "dense") for name in done if name != "dense"]
    pairs += [(a, b) for bytes_ in EQUAL for i, a in enumerate(bytes_) for b in bytes_[i + 1 :]]
    return [verdict(a, b, runs) for a, b in pairs if a in done and b in done]


def page(runs: dict[str, dict[int, dict[str, Any]]], entropy: float, classes: int, args: argparse.Namespace) -> str:
    lines = [
        "# Distilling a language model", "", setting(entropy, classes, args), "", "Written by", "",
        f"    python {' '.join(sys.argv)}", "",
        f"on {os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}, students on "
        f"{torch.get_num_threads()} thread(s), beside other work. Packages: [codec-errors.md](codec-errors.md).", "",
        "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|",
        *(line(name, list(runs[name].values()), classes) for name in ARMS if runs[name]), "",
        "Differences of the KL, seed by seed: against dense, then at equal bytes.", "", *verdicts(runs), "", NOTES,
    ]  # fmt: skip
    return "\n".join(lines)


def setting(entropy: float, classes: int, args: argparse.Namespace) -> str:
    articles, held_out = args.chunks, args.held_out
    return paragraph(f"""
        SmolLM2-135M-Instruct ({classes:,} tokens) read {CHUNK} tokens of each of {articles + held_out} BBC news
        articles. Students are trained from what it said at {articles * (CHUNK - 1):,} positions of {articles} of them,
        and held against its whole distributions at {held_out * (CHUNK - 1):,} positions of the {held_out} others (mean
        entropy {entropy:.3f} nats). A student sees the last 8 tokens; it has one hidden layer, and its embeddings of
        width 128 are its output layer too. {args.epochs} epochs, batches of {args.batch}, AdamW, its rate {args.lr:g}
        falling linearly to zero; the last weights are scored. Initial weights and the order of positions depend on the
        seed alone, so runs of one seed differ in the cache alone. The draws of a cache are the same in each epoch. ± is
        the standard deviation over seeds; bytes are of a row's targets, without 6 for its figures.
    """)


def paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 118)


NOTES = """\
All students are far from the teacher: some thousand positions teach a student the frequencies of tokens more than their
order. It begins with all tokens about equally likely; of the tail topk tells it the mass, and not whose it is.

*Within the spread*: the mean difference is no more than the standard deviations over seeds of both together. Runs of
one seed share initial weights and order, so a difference smaller than that can still be real if all seeds agree on it.

The caches are made by `ensemble-distill cache` from `benchmarks/lm_pipeline.py`. A row of a cache is one position, so
the teacher of that pipeline looks up what the model said when it read whole chunks: asking it anew for each position
would cost a pass over up to a chunk of tokens for every row. *labels*: no teacher, the text's own next tokens.
"""


def teacher_entropy(args: argparse.Namespace) -> float:
    import lm_pipeline

    held = lm_pipeline.said()[args.chunks : args.chunks + args.held_out, :-1]
    chunks = [torch.from_numpy(np.array(chunk)) for chunk in held]
    return statistics.mean(float(-(p.exp() * p).sum(dim=1).mean()) for p in chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/lm-distill"), help="what the teacher said, caches, runs"
    )
    parser.add_argument("--chunks", type=int, default=32, help=f"articles to train on, {CHUNK} tokens of each")
    parser.add_argument("--held-out", type=int, default=6, help="articles to score on")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    if missing := lacking(LANGUAGE):
        sys.exit(f"not installed: {', '.join(missing)} (see docs/codec-errors.md)")
    folder = args.folder.absolute()
    os.environ["LM_DISTILL"] = str(folder)
    language(folder, args.chunks + args.held_out)
    (folder / "held_out").write_text(str(args.chunks))
    for name in dict.fromkeys(FROM if name == LABELS else name for name in args.arms):
        capture(name, folder)
    runs: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in ARMS}
    for seed in range(args.seeds):
        for name in args.arms:
            runs[name][seed] = run(name, seed, folder, args)
    import lm_pipeline

    text = page(runs, teacher_entropy(args), lm_pipeline.said().shape[-1], args)
    print(text)
    if args.write:
        args.write.write_text(text)


if __name__ == "__main__":
    main()
