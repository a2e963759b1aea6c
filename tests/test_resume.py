"""Stopped anywhere, the same command goes on and ends the same: captures and trainings, killed and asked to stop."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
from conftest import Cli
from test_commands import losses

# Makes each forward pass of the teachers (or step of the student) slow enough to be hit by a signal.
SLOW_TEACHER = ("    def forward(self, image):\n", "    def forward(self, image):\n        SLEEP()\n")


def slow(cli: Cli, seconds: float) -> None:
    """Let every forward pass take longer when the environment asks for it: the plan stays the same."""
    cli.change(*SLOW_TEACHER)
    cli.change(
        "HERE = Path(__file__).parent\n",
        "HERE = Path(__file__).parent\n\n\ndef SLEEP():\n    import os, time\n"
        f"    time.sleep({seconds} if 'SLOW' in os.environ else 0)\n",
    )


def digest(cli: Cli, name: str) -> str:
    return json.loads(cli("inspect", name, "--json").stdout)["content_digest"]


def commits(folder: Path) -> int:
    return len(list((folder / "commits").glob("*.json"))) if (folder / "commits").is_dir() else 0


def wait_for(condition, process, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert condition() or process.poll() is not None


def test_a_capture_killed_at_ten_moments_ends_with_the_same_digest(cached: Cli) -> None:
    """kill -9 after a growing number of commits and a random delay; nothing acknowledged may be lost."""
    slow(cached, 0.03)
    chance = random.Random(0)
    out, kept = cached.folder / "killed", 0
    for kill in range(10):
        process = cached.start("cache", "digits.py", "--out", "killed", SLOW="1")
        wait_for(lambda: commits(out) > kept, process)  # noqa: B023
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.communicate()
        assert commits(out) >= kept, f"kill {kill} lost commits"
        kept = commits(out)
    assert kept >= 10
    cached("verify", "killed")
    text = cached("cache", "digits.py", "--out", "killed").stdout
    assert "captured" in text or "already complete" in text
    assert digest(cached, "killed") == digest(cached, "cache")
    assert not list(out.rglob("*.part")) or kept  # temporaries of killed writers are harmless
    cached("verify", "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_capture_asked_to_stop_says_how_far_it_is(cached: Cli, number: signal.Signals) -> None:
    slow(cached, 0.03)
    out = cached.folder / "stopped"
    process = cached.start("cache", "digits.py", "--out", "stopped", SLOW="1")
    wait_for(lambda: commits(out) >= 2, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert f"stopped: {commits(out)}/28 units committed" in error and "run the same command" in error
    assert "Traceback" not in error
    cached("cache", "digits.py", "--out", "stopped")
    assert digest(cached, "stopped") == digest(cached, "cache")


def final(run: Path) -> bytes:
    return (run / "student.safetensors").read_bytes()


COUNT = "def forward(self, x):\n        (HERE / 'steps').open('a').write('.')\n        __import__('time').sleep(0.01)\n"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_training_stopped_and_killed_at_random_steps_ends_bit_for_bit_the_same(cached: Cli, workers: int) -> None:
    """SIGTERM saves in mid-epoch; kill -9 falls back to the last save. Dropout makes the random state count."""
    cached.change("epochs=2", "epochs=6")
    train = ("train", "digits.py:other", "--cache", "cache", "--workers", workers)
    cached(*train, "--out", "straight")
    cached.change("def forward(self, x):\n", COUNT)
    run, steps, chance = cached.folder / "broken", cached.folder / "steps", random.Random(workers)
    stops = [
        signal.SIGTERM,
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGTERM,
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGTERM,
    ]
    codes = []
    for number in stops:
        steps.write_text("")
        after = chance.randrange(3, 14)
        process = cached.start(*train, "--out", "broken")
        wait_for(lambda: steps.stat().st_size >= after, process)  # noqa: B023
        process.send_signal(number)
        error = process.communicate()[1]
        codes.append(process.returncode)
        assert process.returncode == {signal.SIGTERM: 75, signal.SIGKILL: -9}[number], error
        assert number == signal.SIGKILL or ("saved" in error and "step" in error)
    assert not (run / "student.safetensors").exists(), "it was stopped before its end each time"
    cached(*train, "--out", "broken")
    assert losses(run) == losses(cached.folder / "straight")
    assert final(run) == final(cached.folder / "straight")


def test_the_feature_adapter_and_the_average_resume_too(cached: Cli) -> None:
    cached("train", "digits.py", "--cache", "cache", "--out", "straight")
    cached.change("def forward(self, image):\n", "def forward(self, image):\n        __import__('time').sleep(0.02)\n")
    run = cached.folder / "broken"
    process = cached.start("train", "digits.py", "--cache", "cache", "--out", "broken")
    wait_for(lambda: (run / "checkpoint.json").exists(), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    cached("train", "digits.py", "--cache", "cache", "--out", "broken")
    assert losses(run) == losses(cached.folder / "straight")
    assert final(run) == final(cached.folder / "straight")
    state = safetensors.torch.load((run / "student.safetensors").read_bytes())
    assert not [name for name in state if "adapter" in name]  # what only training needs stays out of the student
