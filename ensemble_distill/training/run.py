"""A run: a student trained from a cache, in a directory that can be stopped and resumed anywhere.

config.json              what was asked for, resolved; another config is refused here
metrics.jsonl            a line an epoch, then one for the test split
checkpoint*.*            where to go on: weights, EMA, optimiser, adapters, random state
best-*.safetensors       the student that did best on held_out so far, by its epoch; gone when the run is finished
best.safetensors         the student that did best on held_out
last.safetensors         the student after the last step
student.safetensors      the one to deploy: best where there is a held_out split, else last
adapters.safetensors     where there are any: maps to the teachers' features after the last step; no student needs them
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ensemble_distill.cache.cache import Batch, Cache
from ensemble_distill.config import DataConfig, TrainConfig, describe
from ensemble_distill.device import Resolved, choose_precision, memory_errors, place
from ensemble_distill.errors import Corrupt, Interrupted, InvalidOutput, Mismatch, UsageError
from ensemble_distill.explain import difference
from ensemble_distill.fingerprint import array_digest, sha256
from ensemble_distill.prefetch import timed
from ensemble_distill.provenance import provenance
from ensemble_distill.scoring import score
from ensemble_distill.sources.arrays import Source
from ensemble_distill.sources.loading import load
from ensemble_distill.store.local import LocalStorage
from ensemble_distill.store.store import location
from ensemble_distill.trained import inputs_of
from ensemble_distill.training import checkpoint
from ensemble_distill.training.checkpoint import State
from ensemble_distill.training.functions import digests
from ensemble_distill.training.objective import Objective
from ensemble_distill.training.optim import Ema, learning_rate, make_optimizer
from ensemble_distill.training.start import LAST, begin
from ensemble_distill.weights import printed_digest

EVALUATION_BATCH = 512
WEIGHTS = 1 << 40
BEST = "best.safetensors"
SPREAD = 64  # samples whose keys tell the order of all
log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a reporter is told: after each step, and with ``line`` set at the end of each epoch."""

    step: int
    steps: int
    epoch: int
    epochs: int
    line: Mapping[str, Any] | None = None


Reporter = Callable[[Progress], None]
# Seconds left before the process has to be gone, or None while nobody asked it to stop.
Stop = Callable[[], float | None]


@dataclass
class Clock:
    """Seconds of this epoch, in this process: in all, and waiting for the loader."""

    start: float = field(default_factory=time.perf_counter)
    waited: float = 0.0

    def wait(self, seconds: float) -> None:
        self.waited += seconds

    def report(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        return {"seconds": round(seconds, 2), "loader_wait": round(self.waited / max(seconds, 1e-9), 4)}


class Run:
    """One student, one cache, one directory."""

    def __init__(
        self,
        data: DataConfig,
        config: TrainConfig,
        sources: Mapping[str, Source],
        cache: Cache,
        out: str | Path,
        device: torch.device,
        *,
        workers: int = 1,
    ) -> None:
        """Check everything that can be checked before step 1. Raises UsageError and Mismatch."""
        cache.check(data)
        for split, source in sources.items():
            if split in cache.parts:
                cache.check_labels(source, split)
        for split in ("held_out", "test"):
            if split in sources and split not in cache.parts:
                log.warning("%s holds no split %r: it is left out of the scores", cache.root, split)
        if "train" not in sources:
            raise UsageError("data() has no source named 'train'")
        cache = cache.mixed(config.ensemble)
        if config.views is not None and "train" in cache.parts and config.views > cache.parts["train"].views:
            raise UsageError(
                f"views={config.views}, but {cache.root} holds {cache.parts['train'].views} view(s) of train",
                hint="ask for no more, or append views to the cache",
            )
        self.data, self.config, self.sources, self.cache = data, config, sources, cache
        cache.check_views(sources["train"], "train")
        self.rows = len(cache.positions(sources["train"], "train"))
        if cache.partial:
            log.warning("%s is not complete: trained on %d of %d samples", cache.root, self.rows, len(sources["train"]))
            if not self.rows:
                raise Mismatch(
                    f"{cache.root} is not complete: it holds none of the samples of 'train'",
                    hint="go on with `ensemble-distill cache`",
                )
        self.device, self.workers = device, workers
        self.storage = LocalStorage(out)
        self.best: dict[str, int | float] = {}
        self.best_sha256 = ""
        self.history: list[dict[str, Any]] = []
        self._build_student()
        root = self.storage.path
        if root.exists() and not root.is_dir():
            raise Mismatch(f"{root} is a file, expected the directory of a run", hint="choose a new --out")
        fresh = not root.exists()
        self._hold()
        try:
            self._open_directory()
            self._build()
            self._restore()
        except BaseException:
            self._release()
            if fresh:
                with contextlib.suppress(OSError):  # of what is refused nothing is left, unless it was begun before
                    root.rmdir()
            raise

    # The loop ---------------------------------------------------------------------------------------

    def train(self, report: Reporter = lambda progress: None, stop: Stop = lambda: None) -> dict[str, Any]:
        """Train to the end and return the test line. Interrupted (after saving) when ``stop`` says so.

        However it ends, the directory is free for another ``Run`` then.
        """
        try:
            while self.state["epoch"] < self.config.epochs:
                self._train_epoch(report, stop)
            if not self.state["finished"]:
                self._finish()
                epochs = self.config.epochs
                report(Progress(self.state["step"], self.steps, epochs, epochs, self.history[-1]))
            return self.history[-1]
        finally:
            self._release()

    def _train_epoch(self, report: Reporter, stop: Stop) -> None:
        epoch, clock = self.state["epoch"], Clock()
        sums = torch.tensor(list(self.state["sums"].values()), dtype=torch.float64, device=self.device)
        self.student.train()
        for batch in timed(self._batches("train", epoch, self.state["batch"]), clock.wait):
            with memory_errors(self.config.batch_size):
                sums += self._step(batch) * len(batch.index)
            self.state["step"] += 1
            self.state["batch"] += 1
            report(Progress(self.state["step"], self.steps, epoch, self.config.epochs))
            if stop() is not None:
                self._stop(sums)
        losses = self._losses(sums)
        line = {"epoch": epoch + 1, "step": self.state["step"], "train": losses}
        if "held_out" in self.sources and "held_out" in self.cache.parts:
            line["held_out"] = self._score(self.evaluated, "held_out")
            self._keep_best(line["held_out"])
        line["lr"] = self._rate(self.state["step"] - 1)
        self.history.append(line | {"timing": clock.report()})
        self.state |= {"epoch": epoch + 1, "batch": 0, "sums": dict.fromkeys(self.state["sums"], 0.0)}
        self._save()
        report(Progress(self.state["step"], self.steps, epoch + 1, self.config.epochs, self.history[-1]))

    @torch.enable_grad()  # a pipeline may have said otherwise for the whole process
    def _step(self, batch: Batch) -> Tensor:
        """One optimiser step; the loss and its terms, float64 [1 + terms], left on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.state["step"])
        progress = self.state["step"] / max(1, self.steps - 1)
        loss, parts = self.objective(self.student, batch, self.device, self.precision, progress)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self._parameters(), self.config.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.student)
        return torch.stack([loss.detach(), *parts.values()]).double()

    def _finish(self) -> None:
        weights = last = _weights(self.evaluated)
        self.storage.replace(LAST, last)
        if self.best:
            weights = self._best_weights()
            self.storage.replace(BEST, weights)
        self.storage.replace("student.safetensors", weights)
        if len(self.objective.adapters):
            self.storage.replace("adapters.safetensors", _weights(self.objective.adapters))
        line: dict[str, Any] = {"epoch": self.config.epochs, "step": self.state["step"], "best": self.best}
        line |= {"student": sha256(weights), "last": sha256(last)}
        if "test" in self.sources and "test" in self.cache.parts:
            final = copy.deepcopy(self.evaluated)
            final.load_state_dict(safetensors.torch.load(weights))
            line["test"] = self._score(final, "test")
        self.history.append(line)
        self.state["finished"] = True
        self._save()

    # Pieces -----------------------------------------------------------------------------------------

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are scored and exported: the EMA where there is one."""
        return self.ema.module if self.ema is not None else self.student

    def _batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        training = split == "train"
        return self.cache.loader(
            self.sources[split],
            self.config.batch_size if training else EVALUATION_BATCH,
            split=split,
            epoch=epoch,
            seed=self.config.seed,
            shuffle=training,
            start=start,
            views=self.config.views if training else None,
            taps=self.objective.taps if training else (),
            workers=self.workers,
        )

    def _rate(self, step: int) -> float:
        return learning_rate(self.config.schedule, self.config.optimizer.lr, step, self.steps)

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.student.parameters(), *self.objective.adapters.parameters()]

    def _losses(self, sums: Tensor) -> dict[str, float]:
        rows = self.rows
        losses = {n: v / rows for n, v in zip(self.state["sums"], sums.tolist(), strict=True)}
        return self._finite("the training loss", losses)

    def _score(self, model: nn.Module, split: str) -> dict[str, float]:
        return self._finite(f"a score on {split}", score(model, self._batches(split), self.device, self.precision))

    def _finite(self, what: str, values: dict[str, float]) -> dict[str, float]:
        if not all(map(math.isfinite, values.values())):
            raise InvalidOutput(
                f"{what} is not finite in epoch {self.state['epoch'] + 1}: {values}",
                hint="lower optimizer.lr, set clip=1.0 or precision=fp32; the last checkpoint is safe",
            )
        return values

    def _keep_best(self, scores: Mapping[str, float]) -> None:
        """Best by held-out accuracy, then NLL; without labels by KL to the ensemble."""
        better = {k: scores[k] for k in ("accuracy", "nll", "kl") if k in scores}
        rank = (better.get("accuracy", 0.0), -better.get("nll", better["kl"]))
        held = (self.best.get("accuracy", 0.0), -self.best.get("nll", self.best.get("kl", 0.0)))
        if not self.best or rank > held:
            self.best = better | {"epoch": self.state["epoch"] + 1}
            weights = _weights(self.evaluated)
            self.best_sha256 = sha256(weights)
            # Beside the file that the last checkpoint names: a kill may come before there is another one.
            self.storage.replace(self._best_name(), weights)

    def _best_name(self) -> str:
        return f"best-{int(self.best['epoch']):06d}.safetensors"

    def _best_weights(self) -> bytes:
        """The bytes of the best student so far; Corrupt where they are not those that were saved."""
        name = self._best_name()
        if self.storage.size(name) is None and self.storage.size(BEST) is not None:
            name = BEST  # of a run of an earlier release, which had one file for all epochs
        weights = self.storage.read(name, WEIGHTS)
        if sha256(weights) != self.best_sha256:
            raise Corrupt(
                f"{self.storage.path / name} is damaged: not the weights that were saved",
                hint="train into another --out, or restore the file",
            )
        return weights

    def _stop(self, sums: Tensor) -> None:
        self._losses(sums)
        self.state["sums"] = dict(zip(self.state["sums"], sums.tolist(), strict=True))
        self._save()
        raise Interrupted(
            f"in epoch {self.state['epoch'] + 1}/{self.config.epochs}, step {self.state['step']}/{self.steps} saved",
            hint="run the same command to go on",
        )

    # Building and resuming --------------------------------------------------------------------------

    def _build_student(self) -> None:
        torch.manual_seed(self.config.seed)
        student = self.config.student()
        if not isinstance(student, nn.Module):
            raise UsageError(f"the student function gave a {type(student).__name__}, expected an nn.Module")
        if self.config.start is not None:
            self.begun_with = begin(self.config.start, student, self.data, self.sources["train"])
        self.student = place(student, self.device)

    def _build(self) -> None:
        has_labels = self.sources["train"].labels is not None
        self.objective = Objective(self.config, self.student, self.cache, has_labels)
        first = next(iter(self._batches("train")))  # also proves the first batch's keys before step 1
        self.objective.check(first.targets, self.rows, self.config.batch_size)
        self.objective.build_adapters(self.student, first, self.device)
        self.precision: Resolved = self._resolve_precision(first)
        self.optimizer = make_optimizer(self.config.optimizer, self._parameters())
        self.ema = Ema(self.student, self.config.ema) if self.config.ema else None
        self.steps = self.config.epochs * -(-self.rows // self.config.batch_size)
        self.state: dict[str, Any] = {
            "step": 0, "epoch": 0, "batch": 0, "finished": False,
            "sums": dict.fromkeys(["loss", *self.objective.terms], 0.0),
        }  # fmt: skip

    def _resolve_precision(self, batch: Batch) -> Resolved:
        """``auto`` by timing steps of a copy; the choice stands in config.json, so a resumed run keeps it."""
        held: Resolved | None = self.described.get("precision")
        if held is None:
            probe = copy.deepcopy(self.student)
            with torch.enable_grad(), torch.random.fork_rng(), memory_errors(self.config.batch_size):
                held = choose_precision(
                    self.config.precision,
                    self.device,
                    lambda precision: self.objective(probe, batch, self.device, precision)[0].backward(),
                )
            self.objective.zero_grad()
            self.described["precision"] = held
            self._write_json("config.json", self.described)
        return held

    def _hold(self) -> None:
        """Keep others from training here until this run is released, or is gone; Mismatch where one does already."""
        handle = self.storage.hold()
        if handle is None:
            raise Mismatch(
                f"{self.storage.path}: another process trains here",
                hint="wait until it has ended, or give each run an --out of its own",
            )
        # Closed and not unlocked: a child that was forked meanwhile shares the lock, and may not give it up.
        self._release = weakref.finalize(self, os.close, handle)

    def _open_directory(self) -> None:
        wanted = {
            "data": describe(self.data),
            "train": describe(self.config),
            "student": printed_digest(self.student),
            "rows": {name: len(source) for name, source in sorted(self.sources.items())},
            "cache_content": self.cache.content_digest,
        }
        if functions := digests(self.config, without="student"):
            wanted["functions"] = functions
        if self.config.start is not None:
            wanted["start"] = self.begun_with
        root = self.storage.path
        # Before its first checkpoint a run has nothing to lose: another configuration may have its directory.
        if self.storage.size(checkpoint.NAME) is None:
            names = {e.name for e in root.iterdir() if not e.name.startswith(".")} if root.is_dir() else set()
            if names - {"config.json", BEST, "tensorboard"} - _unnamed(names):
                raise Mismatch(f"{root} is not empty and holds no run", hint="choose a new --out")
            self.described: dict[str, Any] = wanted | {
                "cache": location(self.cache.root),
                "manifest": self.cache.digest,
                "taught_by": self.cache.taught_by(),
                "partial": self.cache.partial,
                "provenance": provenance(),
            }
            if inputs := inputs_of(self.sources["train"]):
                self.described["inputs"] = inputs
            return
        self.described = self._read_config()
        if _of_another_python(self.described, wanted):
            log.warning("%s was begun with another Python: whether its functions are the same is not known", root)
            del wanted["functions"]
        hit = difference({name: self.described.get(name) for name in wanted}, json.loads(json.dumps(wanted)))
        if hit is not None:
            field, old, new = hit
            raise Mismatch(
                f"{root} holds another run: its {field} is {old!r}, this one's {new!r}",
                hint="choose another --out: the cache has grown since, or holds something else"
                if field == "cache_content"
                else "choose another --out, or restore the configuration to go on with that run",
            )

    def _read_config(self) -> dict[str, Any]:
        try:
            value = json.loads(self.storage.read("config.json"))
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{self.storage.path / 'config.json'} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise Corrupt(f"{self.storage.path / 'config.json'} is damaged: no JSON object")
        return value

    def _restore(self) -> None:
        if (saved := checkpoint.load(self.storage)) is None:
            return
        state, tensors = saved
        if state.config != sha256(self.storage.read("config.json")):
            raise Corrupt(f"{self.storage.path / 'config.json'} is damaged: not the configuration of this run")
        if not state.of(self.config.epochs, self.steps // self.config.epochs, self.state["sums"]):
            raise Corrupt(
                f"{self.storage.path / checkpoint.NAME}: no state that a run of {self.steps} steps comes to",
                hint="train into another --out, or restore the file",
            )
        if state.order and state.order != self._order():
            raise Mismatch(
                f"{self.storage.path} stopped in the middle of epoch {state.epoch + 1}, and since then the samples of "
                "'train' stand in another order: some would be seen twice and others never",
                hint="restore their order in the source, or train into another --out",
            )
        self.state = {k: getattr(state, k) for k in ("step", "epoch", "batch", "finished")}
        # JSON has sorted the names; the sums are a vector in the order of the objective's terms.
        self.state["sums"] = {name: state.sums[name] for name in ["loss", *self.objective.terms]}
        self.best, self.history = dict(state.best), [dict(line) for line in state.history]
        self.best_sha256 = state.best_sha256
        if self.best and not state.finished:
            self._best_weights()
        self._write_metrics()  # a kill may have come between a checkpoint and its line
        try:
            self._restore_tensors(tensors)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            detail = str(error).replace("\n\t", " ")[:200]
            raise Corrupt(
                f"{self.storage.path / checkpoint.NAME}: its tensors are not those of this run ({detail})",
                hint="train into another --out, or restore the files",
            ) from error

    def _restore_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for prefix, module in self._modules().items():
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        checkpoint.restore_optimizer(self.optimizer, tensors)
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)

    def _save(self) -> None:
        tensors = {
            f"{prefix}{name}": tensor
            for prefix, module in self._modules().items()
            for name, tensor in module.state_dict().items()
        }
        tensors |= checkpoint.optimizer_tensors(self.optimizer) | {"random/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        state = State(
            **self.state,
            best=self.best,
            best_sha256=self.best_sha256,
            history=tuple(self.history),
            config=self._own_config(),
            order=self._order() if self.state["batch"] else "",
        )
        checkpoint.save(self.storage, state, tensors)
        self._remove_former_best()
        self._write_metrics()

    def _remove_former_best(self) -> None:
        """All but the file that the checkpoint, which has just been saved, names."""
        named = self._best_name() if self.best and not self.state["finished"] else ""
        for path in self.storage.path.glob("best-*.safetensors"):
            if path.name != named:
                self.storage.remove(path.name)

    def _own_config(self) -> str:
        """The SHA-256 of config.json; Mismatch where that is another run's, which began before this one had saved."""
        data = self.storage.read("config.json")
        held, own = (json.loads(text) for text in (data, json.dumps(self.described)))
        if held | {"provenance": None} != own | {"provenance": None}:
            raise Mismatch(
                f"{self.storage.path}: another run has begun here, and config.json is not of this one any more",
                hint="give each run an --out of its own",
            )
        return sha256(data)

    def _order(self) -> str:
        """A digest of the keys of some samples, spread over the split that is trained on."""
        positions = self.cache.positions(self.sources["train"], "train")
        spread = positions[np.linspace(0, len(positions) - 1, min(SPREAD, len(positions))).astype(np.int64)]
        return array_digest(load(self.sources["train"], spread)[1])

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        self.storage.replace("metrics.jsonl", lines.encode())

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"student/": self.student, "adapters/": self.objective.adapters}
        return modules | ({"ema/": self.ema.module} if self.ema is not None else {})

    def _write_json(self, name: str, value: Any) -> None:
        self.storage.replace(name, (json.dumps(value, indent=1) + "\n").encode())


def _of_another_python(held: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether functions were compiled to other byte code, which cannot be compared."""
    functions = (held.get("functions"), wanted.get("functions"))
    versions = {value["python"] for value in functions if isinstance(value, dict) and "python" in value}
    return len(versions) > 1


def _unnamed(names: set[str]) -> set[str]:
    """The files of a run that was killed before a first record named them."""
    return {name for name in names if name.startswith(("checkpoint-", "best-")) and name.endswith(".safetensors")}


def _weights(model: nn.Module) -> bytes:
    return checkpoint.to_bytes(model.state_dict())
