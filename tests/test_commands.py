"""The commands, end to end, as a user types them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from conftest import Cli, flip, shard_of

import ensemble_distill as ed

COMMANDS = ["plan", "cache", "train", "evaluate", "inspect", "audit", "verify"]


def losses(run: Path) -> list[object]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def test_two_commands_lead_from_teachers_to_a_student(cached: Cli) -> None:
    out = cached("train", "digits.py", "--cache", "cache", "--out", "run", "--tensorboard").stdout
    assert "test: accuracy" in out and "waiting for data" in out
    files = {p.name for p in (cached.folder / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "best.safetensors", "last.safetensors", "student.safetensors"} <= files
    assert list((cached.folder / "run" / "tensorboard").iterdir())
    report = json.loads(cached("evaluate", "digits.py", "--run", "run", "--json").stdout)
    assert report["accuracy"] > 0.8 and report["agreement"] > 0.8 and report["parameters"] == 1210
    assert losses(cached.folder / "run")[-1]["test"]["accuracy"] == report["accuracy"]


def test_training_needs_no_teacher(cached: Cli) -> None:
    for weights in cached.folder.glob("?.safetensors"):
        weights.unlink()
    (cached.folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith(('ensemble_distill.ensemble', 'ensemble_distill.recording')):\n"
        "            raise RuntimeError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    held = os.environ.get("PYTHONPATH")  # the package under test may be found by it
    env = {"PYTHONPATH": f"{cached.folder}{os.pathsep}{held}" if held else str(cached.folder)}
    cached("train", "digits.py", "--cache", "cache", "--out", "run", **env)
    cached("cache", "digits.py", "--out", "other", code=1, **env)  # the refusal is real


def test_one_cache_serves_other_students(cached: Cli) -> None:
    cached("train", "digits.py:other", "--cache", "cache", "--out", "other")
    cached("train", "digits.py", "--cache", "cache", "--out", "hot", "--set", "objective.soft.temperature=8")
    assert losses(cached.folder / "other")[0]["train"].keys() == {"loss", "soft"}


def test_parquet_says_the_same_and_teaches_the_same(cached: Cli) -> None:
    cached("cache", "digits.py", "--out", "parquet", "--format", "parquet")
    reports = [json.loads(cached("inspect", name, "--json").stdout) for name in ("cache", "parquet")]
    assert reports[0]["content_digest"] == reports[1]["content_digest"]
    assert reports[0]["manifest_digest"] != reports[1]["manifest_digest"]
    for name in ("cache", "parquet"):
        cached("train", "digits.py", "--cache", name, "--out", f"run-{name}")
    assert losses(cached.folder / "run-cache") == losses(cached.folder / "run-parquet")


def test_a_second_run_of_each_command_reuses_what_is_there(cached: Cli) -> None:
    assert "already complete" in cached("cache", "digits.py", "--out", "cache").stdout
    cached("train", "digits.py", "--cache", "cache", "--out", "run", "--limit", 200)
    assert "finished" in cached("train", "digits.py", "--cache", "cache", "--out", "run", "--limit", 200).stdout


def test_workers_and_memory_do_not_change_a_run(cached: Cli) -> None:
    cached("train", "digits.py", "--cache", "cache", "--out", "one")
    cached("train", "digits.py", "--cache", "cache", "--out", "four", "--workers", 4)
    assert losses(cached.folder / "one") == losses(cached.folder / "four")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(cli: Cli, command: str) -> None:
    text = cli(command, "--help").stdout
    assert "Example:" in text and f"ensemble-distill {command}" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_one_set_of_flags_serves_every_command(cli: Cli, command: str) -> None:
    text = cli(command, "--help").stdout
    for flag in ("--limit", "--batch-size", "--workers", "--device", "--quiet", "--version"):
        assert flag in text
    assert cli(command, "--version").stdout == f"ensemble-distill {ed.__version__}\n"


def test_verify_imports_no_torch(cached: Cli) -> None:
    flags = ("--limit", 100, "--batch-size", 7, "--workers", 2, "--device", "cpu", "--quiet")
    process = cached("verify", "cache", *flags, PYTHONPROFILEIMPORTTIME="1")
    assert process.stdout == "" and not re.search(r"\btorch$", process.stderr, re.MULTILINE)
    assert cached("inspect", "cache", *flags).stdout == ""


def test_verify_can_stop_after_the_first_samples(cached: Cli) -> None:
    flip(shard_of(cached.folder / "cache", "train-v000000-00000004.targets"))
    whole = cached("verify", "cache", "--json", code=4)
    first = cached("verify", "cache", "--json", "--limit", 800)
    assert json.loads(first.stdout)["bytes"] < json.loads(whole.stdout)["bytes"]
    cached("verify", "cache", "--limit", 801, code=4)


def test_help_imports_no_torch(cli: Cli) -> None:
    process = cli("--help", PYTHONPROFILEIMPORTTIME="1")
    assert "torch" not in process.stderr and "pydantic" not in process.stderr


def test_quiet_is_quiet_and_inspect_shows_the_plan(cached: Cli) -> None:
    assert cached("cache", "digits.py", "--out", "again", "--quiet", "--limit", 100).stdout == ""
    text = cached("inspect", "cache").stdout
    assert "members" in text and "tap/a.pool" in text and "content digest" in text
    assert "all as they were committed" in cached("verify", "cache").stdout
    assert json.loads(cached("verify", "cache", "--json").stdout)["ok"] is True


def test_labels_are_optional(cli: Cli) -> None:
    cli.change('ed.ArraySource({"image": images[part]}, labels[part])', 'ed.ArraySource({"image": images[part]})')
    assert "no labels" in cli("cache", "digits.py", "--out", "cache").stdout
    error = cli("train", "digits.py", "--cache", "cache", "--out", "run", code=2).stderr
    assert "needs labels" in error
    cli("train", "digits.py:other", "--cache", "cache", "--out", "run")
    assert losses(cli.folder / "run")[-1]["test"].keys() == {"agreement", "kl"}
