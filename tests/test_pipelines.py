"""The pipelines of features run as they stand, all from one cache; they differ in students and objectives only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
from conftest import Cli

ROOT = Path(__file__).parents[1]
FEW = ("--limit", 24, "--set", "precision=fp32")
VARIANTS = [
    "hints.py:train", "hints.py:int8", "attention_transfer.py:train", "attention_transfer.py:vit",
    "attention_transfer.py:vit_soft", "relational.py:train", "relational.py:similarity", "relational.py:contrastive",
    "compose.py:train", "compose.py:hinted", "compose.py:soft", "compose.py:decoupled", "compose.py:dist",
    "compose.py:annealed", "compose.py:careful",
]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "cache"
    Cli(ROOT)("cache", "pipelines/hints.py", "--out", path, *FEW)
    return path


def train(cache: Path, variant: str, out: Path, *settings: str) -> list[dict[str, dict[str, float]]]:
    chosen = [part for setting in ("epochs=1", *settings) for part in ("--set", setting)]
    Cli(ROOT)("train", f"pipelines/{variant}", "--cache", cache, "--out", out, *FEW, *chosen)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_objective_trains_from_the_one_cache(cache: Path, tmp_path: Path, variant: str) -> None:
    line, last = train(cache, variant, tmp_path / "run")
    assert set(line["train"]) >= {"loss", "hard"} and "accuracy" in last["test"]


def test_a_sum_is_changed_from_the_command_line(cache: Path, tmp_path: Path) -> None:
    line, _ = train(cache, "hints.py:train", tmp_path / "run", "objective.soft.weight=0", "objective.hard.weight=1")
    assert set(line["train"]) == {"loss", "hard", "hint"}


def test_two_stages_learn_a_hint_and_then_the_rest(cache: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert set(train(cache, "hints.py:first", first)[0]["train"]) == {"loss", "hint"}
    train(cache, "hints.py:second", second, f"start={first}", "optimizer.lr=1e-30", "optimizer.weight_decay=0")
    begun, ended = (safetensors.torch.load_file(run / "last.safetensors") for run in (first, second))
    assert begun["stage1.conv1.weight"].equal(ended["stage1.conv1.weight"])


@pytest.mark.parametrize("file", ["attention_transfer.py", "relational.py", "compose.py"])
def test_every_pipeline_would_capture_the_same(cache: Path, file: str) -> None:
    said = Cli(ROOT)("cache", f"pipelines/{file}", "--out", cache, *FEW)
    assert "nothing to do" in said.stdout + said.stderr or "complete" in said.stdout + said.stderr
