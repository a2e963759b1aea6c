"""The pipeline of lm_distill.py: one row for each position of a text, whose next token SmolLM2 foretells.

A window of tokens alone would cost the teacher a pass for every row. So it has read whole chunks before
(``real_teachers.language``), and the member looks up what it said: the position is an input beside the window. The
folder with what it said is named by the environment variable LM_DISTILL.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ensemble_distill as ed

FOLDER = Path(os.environ.get("LM_DISTILL", "runs/lm-distill"))
WINDOW = 8  # tokens that the student sees
WIDTH, HIDDEN = 128, 512


def tokens() -> np.ndarray:
    """int32 [chunks, tokens]."""
    return np.load(FOLDER / "tokens.npy")


def said() -> np.ndarray:
    """The teacher's next-token log-probabilities, float32 [chunks, tokens, V], a memory map."""
    return np.load(FOLDER / "logprobs.npy", mmap_mode="r")


def source(first: int, last: int) -> ed.ArraySource:
    """All positions of some chunks but the last of each, which has no next token; windows are filled up with zeros."""
    held = tokens()
    padded = np.pad(held, ((0, 0), (WINDOW - 1, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[first:last, :-1]
    position = np.arange(held.size, dtype=np.int32).reshape(held.shape)[first:last, :-1]
    inputs = {"window": windows.reshape(-1, WINDOW), "position": position.reshape(-1)}
    return ed.ArraySource(inputs, held[first:last, 1:].reshape(-1))


class Lookup(nn.Module):
    """What the teacher said at a position. Its identity in the plan is the SHA-256 of the teacher's file."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = (FOLDER / "teacher").read_text()
        self._said = said()
        self._said = self._said.reshape(-1, self._said.shape[-1])

    def forward(self, window: Tensor, position: Tensor) -> Tensor:
        return torch.from_numpy(self._said[position.numpy()])


class Student(nn.Module):
    """The last WINDOW tokens' embeddings through one hidden layer; the output shares them. Logits [B, V]."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.body = nn.Sequential(
            nn.Flatten(), nn.LayerNorm(WINDOW * WIDTH), nn.Linear(WINDOW * WIDTH, HIDDEN), nn.GELU(),
            nn.Linear(HIDDEN, WIDTH),
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)

    def forward(self, window: Tensor, position: Tensor) -> Tensor:
        hidden = self.body(self.embedding(window.long()))
        return nn.functional.linear(hidden, self.embedding.weight, self.bias)


def held_out() -> int:
    """The first chunk of the held-out ones, of other articles than those before it."""
    return int((FOLDER / "held_out").read_text())


def data() -> ed.DataConfig:
    classes = tuple(f"token {i}" for i in range(said().shape[-1]))
    return ed.DataConfig(sources={"train": source(0, held_out())}, classes=classes)


def cache() -> ed.CacheConfig:
    return ed.CacheConfig(members=(ed.Member(name="smollm2", build=Lookup),), batch_size=256, precision="fp32")


def train() -> ed.TrainConfig:
    return ed.TrainConfig(student=lambda: Student(said().shape[-1]), objective={"soft": ed.SoftTargets()}, epochs=2)
