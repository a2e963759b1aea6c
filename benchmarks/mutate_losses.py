# ruff: noqa: E501 (a mutation stands on its line)
"""Each term of each loss changed in turn, and what terms hand to them: which change does no test notice?

    python benchmarks/mutate_losses.py --write docs/loss-mutations.md

A mutation is a file of ``losses/``, a text that stands in it once, and another text. The tests of the losses are
collected once; then a process is forked for each mutation, compiles the changed file, gives the functions of the
package their changed code, and runs the tests until one fails: first those whose names fit the file, then all others
(but those of ``torch.compile``, which only repeat what others check). No file of the package is written to. A survivor
is a mutation that no test notices. ``--only PATTERN`` tries those whose file or text it is found in; with ``--state
FILE`` a run goes on where an earlier one stopped, and what was noticed before is not tried again.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).parents[1]
TESTS = ("test_objectives.py", "test_objective_cases.py", "test_losses.py", "test_terms.py")
SECONDS = 300

# By file: a pattern of the names of the tests to begin with, and the mutations.
MUTATIONS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "rows.py": ("rows|half|refused", [
        ("x if x.dtype == torch.float64 else x.float()", "x.float()"),
        ("x if x.dtype == torch.float64 else x.float()", "x"),
        ("return mean(rows_B, weights_B)", "return mean(rows_B, None)"),
        ("return mean(rows_B, weights_B)", "return rows_B.sum()"),
        ("    if weights_B is not None:\n", "    if False:\n"),
        ('    if reduction not in ("mean", "none"):\n', "    if False:\n"),
        ("    if student.shape != teacher.shape:\n", "    if False:\n"),
        ("    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):\n", "    if False:\n"),
        ("    if len(student) < least:\n", "    if False:\n"),
        ("    if len(student) < least:\n", "    if len(student) <= least:\n"),
        ("    if not fit or any(student.shape[i] != teacher.shape[i] for i in axes):\n", "    if not fit:\n"),
    ]),
    "geometry.py": ("direction|constant|nearly|autocast|extremes", [
        ("    x = by_largest(x, dim)\n", ""),
        ("torch.where(norm == 0, 0, x / norm.clamp(min=1))", "x / norm"),
        ("torch.where(norm == 0, 0, x / norm.clamp(min=1))", "x / norm.clamp(min=1e-12)"),
        ("torch.where(norm == 0, 0, x / norm.clamp(min=1))", "x / norm.detach().clamp(min=1)"),
        ("torch.where(norm == 0, 0, x / norm.clamp(min=1))", "torch.where(norm > 0, x / norm.clamp(min=1), 0)"),
        ("    return x / torch.where(largest > 0, largest, 1)\n", "    return x / largest\n"),
        ("deviation = x - x.mean(dim=dim, keepdim=True)", "deviation = x"),
        ("deviation = x - x.mean(dim=dim, keepdim=True)", "deviation = x - x.detach().mean(dim=dim, keepdim=True)"),
        ("    return deviation.masked_fill(constant, 0)\n", "    return deviation\n"),
        ("8 * torch.finfo(x.dtype).eps", "800 * torch.finfo(x.dtype).eps"),
        ("enabled=False", "enabled=True"),
        (', compute_mode="donot_use_mm_for_euclid_dist"', ', compute_mode="use_mm_for_euclid_dist"'),
    ]),
    "features.py": ("feature|regressor", [
        ("reduced(1 - cosine, weights, reduction)", "reduced(cosine, weights, reduction)"),
        ("unit(precise(student_BD)) * unit(precise(teacher_BD))", "precise(student_BD) * unit(precise(teacher_BD))"),
        ("unit(precise(student_BD)) * unit(precise(teacher_BD))", "unit(precise(student_BD)) * precise(teacher_BD)"),
        ("unit(precise(student_BD)) *", "unit(precise(student_BD)).detach() *"),
        ("0.5 * (precise", "(precise"),
        (".flatten(1).sum(dim=1)", ".flatten(1).mean(dim=1)"),
        (".flatten(1).sum(dim=1)", ".flatten(1).sum(dim=1).sqrt()"),
        ("(precise(teacher) - precise(student))", "(precise(teacher) - precise(student).detach())"),
        ("nn.Conv2d(student_width, teacher_width, 1)", "nn.Conv2d(student_width, teacher_width, 3)"),
        ("nn.Linear(student_width, teacher_width)", "nn.Linear(student_width, student_width)"),
        ('    same_shape("feature_l2", student, teacher)\n', ""),
        ('    same_shape("feature_cosine", student_BD, teacher_BD)\n', ""),
    ]),
    "attention.py": ("attention", [
        ("    if p < 1:\n", "    if False:\n"),
        ("    if features_BCHW.ndim < 3:\n", "    if False:\n"),
        ("by_largest(precise(features_BCHW).flatten(2), 1, 2)", "precise(features_BCHW).flatten(2)"),
        (".abs().pow(p)", ".abs()"),
        (".abs().pow(p)", ".pow(p)"),
        (".pow(p).sum(dim=1)", ".pow(p).amax(dim=1)"),
        ("return unit(scaled_BCN", "return (scaled_BCN"),
        ("unit(precise(student_map_BN))", "precise(student_map_BN)"),
        ("- unit(precise(teacher_map_BN))", "- precise(teacher_map_BN)"),
        ("difference.square().mean(dim=1)", "difference.square().sum(dim=1)"),
        ("difference.square().mean(dim=1) if squared", "difference.square().mean(dim=1) if True"),
        ("torch.linalg.vector_norm(difference, dim=1)", "torch.linalg.vector_norm(difference, ord=1, dim=1)"),
        ("torch.linalg.vector_norm(difference, dim=1)", "difference.square().sum(dim=1).sqrt()"),
        ("squared: bool = True", "squared: bool = False"),
        ('    if divergence not in ("kl", "mse"):\n', "    if False:\n"),
        ("(precise(x).mean(dim=1)", "(precise(x).sum(dim=1)"),
        ("(precise(x).mean(dim=1)", "(precise(x)[:, 0]"),
        ("(q - p).square().mean(dim=2)", "(q - p).square().sum(dim=2)"),
        ("(p * (p.clamp", "(q * (p.clamp"),
        ("p.clamp(min=FLOOR).log() - q", "q.clamp(min=FLOOR).log() - p"),
        ("p.clamp(min=FLOOR).log() - ", "- "),
        ("FLOOR = math.exp(-30)", "FLOOR = math.exp(-20)"),
        ("over_tokens(tokens_BT, mask_BT)", "over_tokens(tokens_BT, None)"),
    ]),
    "tokens.py": ("tokens|padding|bert|minilm", [
        ("    if mask_BT is None:\n        return values_BT.mean(dim=1)", "    if mask_BT is None:\n        return values_BT.sum(dim=1)"),
        (".masked_fill(~real, 0)", ""),
        (" / real.sum(dim=1).clamp(min=1)", ""),
        (" / real.sum(dim=1).clamp(min=1)", " / real.shape[1]"),
        ("real.sum(dim=1).clamp(min=1)", "real.sum(dim=1)"),
        ("seen = seen.tril()", "seen = seen.triu()"),
        ("    if causal:\n", "    if False:\n"),
        ("[:, None, None, :]", "[:, None, :, None]"),
        ("    if mask_BT.shape != (rows, tokens):\n", "    if False:\n"),
    ]),
    "relations.py": ("rkd|angle|beyond|wide", [
        (" or x_BD.requires_grad:", ":"),
        ("(x_BD - x_BD.mean(dim=0)).T", "x_BD[:, : len(x_BD)].T"),
        ("return r.T[first_equal_B]", "return r.T"),
        ("return r.T[first_equal_B]", "return r[first_equal_B]"),
        ('F.huber_loss(_relative(precise(student_BD)), _relative(precise(teacher_BE)), reduction="sum")',
         '0.5 * F.mse_loss(_relative(precise(student_BD)), _relative(precise(teacher_BE)), reduction="sum")'),
        ('_relative(precise(teacher_BE)), reduction="sum")', '_relative(precise(teacher_BE)), reduction="sum", delta=2.0)'),
        ("_relative(precise(student_BD))", "distances(precise(student_BD))"),
        ("_relative(precise(teacher_BE))", "distances(precise(teacher_BE))"),
        ("_relative(precise(student_BD))", "_relative(precise(student_BD)).detach()"),
        ("errors / (b * (b - 1))", "errors"),
        ("errors / (b * (b - 1))", "errors / b**2"),
        ("mean = d.sum() / (len(x) * (len(x) - 1))", "mean = d.mean()"),
        ("mean = d.sum() / (len(x) * (len(x) - 1))", "mean = d.detach().sum() / (len(x) * (len(x) - 1))"),
        ("mean = d.sum() / (len(x) * (len(x) - 1))", "mean = d.amax()"),
        ("torch.where(mean > 0, mean, 1)", "mean"),
        ("total / (b * (b - 1) * (b - 2))", "total"),
        ("total / (b * (b - 1) * (b - 2))", "total / b**3"),
        ('F.huber_loss(_cosines(student, first, chunk), _cosines(teacher, first, chunk), reduction="none")',
         '0.5 * F.mse_loss(_cosines(student, first, chunk), _cosines(teacher, first, chunk), reduction="none")'),
        ("errors.masked_fill(same, 0).sum()", "errors.sum()"),
        ("e = unit(x[None, :] - x[first : first + chunk, None], dim=2)",
         "e = x[None, :] - x[first : first + chunk, None]"),
        ("unit(x[None, :] - x[first : first + chunk, None], dim=2)", "unit(x[None, :] + 0 * x[first : first + chunk, None], dim=2)"),
        ("unit(x[None, :] - x[first : first + chunk, None], dim=2)", "unit(x[None, :] - x[first : first + chunk, None], dim=1)"),
        ("for first in range(0, b, chunk):", "for first in range(0, b - 1, chunk + 1):"),
        ("_cosines(student, first, chunk),", "_cosines(student, first, chunk).detach(),"),
        ("checkpoint(\n            _angle_errors, student, teacher, first, chunk, use_reentrant=False, preserve_rng_state=False\n        )",
         "_angle_errors(student, teacher, first, chunk)"),
        ("    if chunk < 1:\n", "    if False:\n"),
        ('same_rows("rkd_distance", student_BD, teacher_BE, least=2)', 'same_rows("rkd_distance", student_BD, teacher_BE)'),
        ('same_rows("rkd_angle", student_BD, teacher_BE, least=3)', 'same_rows("rkd_angle", student_BD, teacher_BE, least=2)'),
    ]),
    "similarity.py": ("similarity|congruence|pkt|series", [
        ("(unit(product(teacher, teacher.T)) - unit", "(product(teacher, teacher.T) - unit"),
        ("- unit(product(student, student.T)))", "- product(student, student.T))"),
        ("unit(product(student, student.T)))", "unit(product(student, student.T), dim=0))"),
        ("- unit(product(student, student.T))).square().mean()", "- unit(product(student, student.T))).square().sum()"),
        ("- unit(product(student, student.T)))", "- unit(product(student, student.T)).detach())"),
        ("_gaussian(student, gamma, order)).square().mean()", "_gaussian(student, gamma, order)).square().sum() / len(student)"),
        ("_gaussian(student, gamma, order)).square()", "_gaussian(student, gamma, order)).abs()"),
        ("gamma: float = 0.4", "gamma: float = 0.5"),
        ("order: int | None = 2", "order: int | None = 3"),
        ("    if order is not None and order < 1:\n", "    if False:\n"),
        ("    directions = unit(precise(x))\n", "    directions = precise(x)\n"),
        ("(2 * gamma * (cosines - 1)).exp()", "(gamma * (cosines - 1)).exp()"),
        ("(2 * gamma * (cosines - 1)).exp()", "(2 * gamma * cosines).exp()"),
        ("(2 * gamma) ** p / math.factorial(p)", "(2 * gamma) ** p"),
        ("(2 * gamma) ** p / math", "gamma**p / math"),
        ("* cosines**p for", "* cosines for"),
        ("range(order + 1)", "range(order)"),
        ("math.exp(-2 * gamma) * sum", "sum"),
        ("math.exp(-2 * gamma)", "math.exp(-gamma)"),
        ("p, q = _conditional(teacher_BE), _conditional(student_BD)", "q, p = _conditional(teacher_BE), _conditional(student_BD)"),
        ("(p * (p.clamp(min=LEAST**2).log() - q", "(p * (- q"),
        (".sum(dim=0).mean()", ".sum()"),
        ("(_cosines(x) + 1)", "(_cosines(x) + 2)"),
        (" / 2).clamp(min=LEAST)", " / 2).clamp(min=0)"),
        ("    kernel = kernel - kernel.diag().diag()\n", ""),
        ("    return kernel / kernel.sum(dim=0)\n", "    return kernel / kernel.sum()\n"),
        ('same_rows("pkt", student_BD, teacher_BE, least=3)', 'same_rows("pkt", student_BD, teacher_BE, least=2)'),
        ('same_rows("similarity_preserving", student_BD, teacher_BE, least=2)', 'same_rows("similarity_preserving", student_BD, teacher_BE)'),
        ('same_rows("correlation_congruence", student_BD, teacher_BE, least=2)', 'same_rows("correlation_congruence", student_BD, teacher_BE)'),
    ]),
    "decoupled.py": ("decoupled", [
        ("temperature**2 * (alpha * target + beta * others)", "alpha * target + beta * others"),
        ("temperature**2 * (alpha", "temperature * (alpha"),
        ("alpha * target + beta * others", "target + beta * others"),
        ("alpha * target + beta * others", "alpha * target + others"),
        ("alpha * target + beta * others", "beta * target + alpha * others"),
        ("beta: float = 8.0", "beta: float = 1.0"),
        ("(expected(a, a) - expected(a, b) for a, b", "(expected(b, b) - expected(b, a) for a, b"),
        ("(expected(a, a) - expected(a, b) for a, b", "(-expected(a, b) for a, b"),
        ("_split_all(targets.at(temperature).logprobs, labels_B)", "_split_all(targets.logprobs, labels_B)"),
        ("precise(student_logits_BC) / temperature", "precise(student_logits_BC)"),
        ("    refuse_sample(targets, \"decoupled distillation\")\n", ""),
        ("logits_BC.masked_fill(is_label, -torch.inf)", "logits_BC"),
        ("torch.log_softmax(torch.stack([own_B, total], dim=1), dim=1)", "torch.stack([own_B, total], dim=1)"),
        ("others_BN - total.masked_fill(total.isneginf(), 0)[:, None]", "others_BN"),
        ("total.masked_fill(total.isneginf(), 0)", "total"),
        ("dim=1), temperature)\n", "dim=1))\n"),
        ("    kept = logs[:, :-1].masked_fill(ids_BK == labels_B[:, None], -torch.inf)\n", "    kept = logs[:, :-1]\n"),
        ("torch.cat([kept, rest[:, None]], dim=1)", "kept"),
        ("held = targets.at(temperature)", "held = targets"),
        ("    if not bool(found.all()):\n", "    if False:\n"),
        ("        own = torch.where(found, own, _label_at(targets, found, temperature))\n",
         "        own = _label_at(targets, found, temperature)\n"),
        ("(rest - own.exp()).clamp(min=0)", "rest"),
        ("    kept = held.logprobs.masked_fill(is_label, -torch.inf)\n", "    kept = held.logprobs\n"),
        ("    if temperature == 1:\n        return targets.label_logprob\n    return targets.label_logprob / temperature - targets.log_z_at(temperature)",
         "    return targets.label_logprob"),
        (" - targets.log_z_at(temperature)", ""),
        ("targets.label_logprob is None or bool(targets.label_logprob[~found_B].isnan().any())", "targets.label_logprob is None"),
        ("bool(targets.label_logprob[~found_B].isnan().any())", "bool(targets.label_logprob.isnan().any())"),
    ]),
    "dist.py": (r"\[dist\]|of_all_classes", [
        ("temperature**2 * (beta * inter.mean()", "(beta * inter.mean()"),
        ("beta * inter.mean() +", "inter.mean() +"),
        ("beta * inter.mean() +", "beta * inter.sum() +"),
        ("gamma * intra.mean()", "intra.mean()"),
        ("gamma * intra.mean()", "gamma * intra.sum()"),
        ("(1 - _pearson(q, p, dim)", "(_pearson(q, p, dim)"),
        ("for dim in (1, 0))", "for dim in (0, 1))"),
        ("for dim in (1, 0))", "for dim in (1, 1))"),
        ("torch.softmax(logits / temperature, dim=1)", "torch.softmax(logits, dim=1)"),
        ("torch.softmax(logits / temperature, dim=1)", "logits / temperature"),
        ("unit(centred(a, dim), dim) *", "unit(a, dim) *"),
        ("* unit(centred(b, dim), dim)", "* unit(b, dim)"),
        ("unit(centred(a, dim), dim) *", "centred(a, dim) *"),
        ("_pearson(q, p, dim)", "_pearson(q.detach(), p, dim)"),
        ('    if targets.kind != "dense":\n', "    if False:\n"),
        (", least=2)", ")"),
    ]),
    "standardised.py": ("standardised", [
        ("temperature**2 * (expected", "(expected"),
        ("(expected(p, p) - expected(p, q))", "(expected(q, q) - expected(q, p))"),
        ("(expected(p, p) - expected(p, q))", "(-expected(p, q))"),
        ("z_score(teacher.clamp(min=-30)) / temperature", "z_score(teacher.clamp(min=-30))"),
        ("z_score(teacher.clamp(min=-30))", "teacher.clamp(min=-30)"),
        ("z_score(precise(student_logits_BC)) / temperature", "z_score(precise(student_logits_BC))"),
        ("z_score(precise(student_logits_BC))", "precise(student_logits_BC)"),
        ("teacher.clamp(min=-30)", "teacher"),
        ("teacher.clamp(min=-30)", "teacher.clamp(min=-20)"),
        ("math.sqrt(logits_BC.shape[1])", "1"),
        ("math.sqrt(logits_BC.shape[1])", "math.sqrt(logits_BC.shape[1] - 1)"),
        ("unit(centred(logits_BC, 1))", "unit(logits_BC)"),
        ("unit(centred(logits_BC, 1))", "centred(logits_BC, 1)"),
        ('    same_shape("standardised", student_logits_BC, teacher)\n', ""),
    ]),
    "contrastive.py": ("crd|contrastive|projections", [
        ("precise(student_BE) / temperature", "precise(student_BE)"),
        ("shift = math.log(n / m)", "shift = 0.0"),
        ("shift = math.log(n / m)", "shift = math.log(1 / m)"),
        ("shift = math.log(n / m)", "shift = math.log(m / n)"),
        ("samples or len(bank_ME)", "len(bank_ME)"),
        ("temperature: float = 0.1", "temperature: float = 0.07"),
        ("F.softplus(shift - same) + ", ""),
        ("F.softplus(shift - same)", "F.softplus(same - shift)"),
        ("F.softplus(other_BN - shift)", "F.softplus(shift - other_BN)"),
        ("F.softplus(other_BN - shift).sum(dim=1)", "F.softplus(other_BN - shift).mean(dim=1)"),
        (" + F.softplus(other_BN - shift).sum(dim=1)", ""),
        ("F.softplus(shift - same)", "(1 + (shift - same).exp()).log()"),
        ("bank[positives_B]", "bank[negatives_BN[:, 0]]"),
        ("bank[negatives_BN]", "bank[negatives_BN].detach()"),
        ("bank[positives_B]", "bank[positives_B].detach()"),
        ("unit(precise(self.linear(features_BD)))", "precise(self.linear(features_BD))"),
        ("unit(precise(self.linear(features_BD)))", "unit(self.linear(features_BD))"),
        ("or student.shape[1] != bank.shape[1]:", "or False:"),
        ("    if positives.shape != (b,) or negatives.ndim != 2", "    if False and negatives.ndim != 2"),
    ]),
    "variational.py": ("vid|variational|gaussian", [
        ("0.5 * variance.log() + ", ""),
        ("0.5 * variance.log()", "variance.log()"),
        ("error_BCN / (2 * variance)", "error_BCN / variance"),
        ("error_BCN / (2 * variance)", "error_BCN / 2"),
        (".square().reshape", ".abs().reshape"),
        (".sum(dim=(1, 2))", ".mean(dim=(1, 2))"),
        ("math.log(math.expm1(initial - epsilon))", "math.log(initial)"),
        ("F.softplus(precise(self.alpha)) + self.epsilon", "F.softplus(precise(self.alpha))"),
        ("F.softplus(precise(self.alpha)) + self.epsilon", "precise(self.alpha).exp() + self.epsilon"),
        ("(precise(teacher) - precise(mean))", "(precise(teacher) - precise(mean).detach())"),
        ("variance = precise(variance_C)[:, None]", "variance = precise(variance_C).detach()[:, None]"),
        ('    same_shape("vid", mean, teacher)\n', ""),
        ("    if mean.ndim < 2 or variance_C.shape != mean.shape[1:2]:\n", "    if False:\n"),
        ("regressor(student_width, teacher_width, positions)", "regressor(student_width, teacher_width)"),
    ]),
    "selectivity.py": ("nst", [
        ("kernel(t, t) + kernel(s, s) - 2 * kernel(t, s)", "kernel(s, s) - 2 * kernel(t, s)"),
        ("kernel(t, t) + kernel(s, s) - 2 * kernel(t, s)", "kernel(t, t) - 2 * kernel(t, s)"),
        ("- 2 * kernel(t, s)", "- kernel(t, s)"),
        (" - 2 * kernel(t, s)", ""),
        (".pow(degree)", ""),
        (" + offset).pow", ").pow"),
        ("degree: int = 2", "degree: int = 1"),
        ("offset: float = 0.0", "offset: float = 1.0"),
        ("unit(precise(x).flatten(2), dim=2)", "precise(x).flatten(2)"),
        ("unit(precise(x).flatten(2), dim=2)", "unit(precise(x).flatten(2), dim=1)"),
        (".mean(dim=(1, 2))", ".sum(dim=(1, 2))"),
        ("kernel(t, s), weights", "kernel(t, s.detach()), weights"),
        ('    same_axes("nst", student_BCHW, teacher_BDHW, "B, C, H, W", 0, 2, 3)\n', ""),
    ]),
    "flow.py": ("fsp|flow", [
        (" / first.shape[2]", ""),
        (" / first.shape[2]", " / first.shape[1]"),
        ("product(first, second.transpose(1, 2))", "product(first, first.transpose(1, 2))"),
        (".square().sum(dim=(1, 2))", ".square().mean(dim=(1, 2))"),
        (".square().sum(dim=(1, 2))", ".abs().sum(dim=(1, 2))"),
        ("precise(student_BMN))", "precise(student_BMN).detach())"),
        ('    same_axes("flow_matrix", first_BMHW, second_BNHW, "B, C, H, W", 0, 2, 3)\n', ""),
        ('    same_axes("fsp", student_BMN, teacher_BMN, "B, M, N", 0, 1, 2)\n', ""),
    ]),
    "factor.py": ("factor", [
        ("unit(precise(teacher).flatten(1))", "precise(teacher).flatten(1)"),
        ("unit(precise(student).flatten(1))", "precise(student).flatten(1)"),
        ("difference.abs().sum(dim=1)", "difference.abs().mean(dim=1)"),
        ("difference.abs().sum(dim=1)", "difference.square().sum(dim=1)"),
        ("precise(student).flatten(1))", "precise(student).detach().flatten(1))"),
        ('    same_shape("factor_transfer", student, teacher)\n', ""),
    ]),
    "tinybert.py": ("tinybert|layers|tokens|pairs", [
        (".square().mean(dim=2)", ".square().sum(dim=2)"),
        ("(precise(student_BTD) - precise(teacher_BTD))", "(precise(student_BTD).detach() - precise(teacher_BTD))"),
        ("over_tokens(tokens, mask_BT)", "over_tokens(tokens, None)"),
        ("        seen = seen & checked(mask_BT, *seen.shape[::3])[:, None, :, None]\n", "        pass\n"),
        ("pairs(student_BHTT, mask_BT, causal)", "pairs(student_BHTT, mask_BT, False)"),
        ("pairs(student_BHTT, mask_BT, causal)", "pairs(student_BHTT, None, causal)"),
        (".masked_fill(~seen, 0)", ""),
        (".clamp(min=1) * student.shape[1]", ".clamp(min=1)"),
        (".clamp(min=1) * student.shape[1]", " * student.shape[1]"),
        ("(student - teacher).square().sum(dim=(1, 2, 3)) / count", "(student - teacher).square().mean(dim=(1, 2, 3))"),
        ("(student - teacher).square()", "(student - teacher).abs()"),
        ('    same_axes("tinybert_hidden", student_BTD, teacher_BTD, "B, T, D", 0, 1, 2)\n', ""),
        ('    same_axes("tinybert_attention", student_BHTT, teacher_BHTT, "B, heads, T, T", 0, 1, 2, 3)\n', ""),
        ("    if not 1 <= student_layers <= teacher_layers or teacher_layers % student_layers:\n", "    if False:\n"),
        ("step * m for m in range(1, student_layers + 1)", "step * m for m in range(student_layers)"),
    ]),
    "minilm.py": ("minilm|relation|padding", [
        (" / math.sqrt(a.shape[3])", ""),
        ("math.sqrt(a.shape[3])", "math.sqrt(a_BTD.shape[2])"),
        (".reshape(*x.shape[:2], heads, -1).transpose(1, 2)", ".reshape(*x.shape[:2], -1, heads).permute(0, 3, 1, 2)"),
        ("product(a, b.transpose(2, 3))", "product(b, a.transpose(2, 3))"),
        ("product(a, b.transpose(2, 3))", "product(a, a.transpose(2, 3))"),
        ("p.exp() * (p - q)", "q.exp() * (q - p)"),
        ("p.exp() * (p - q)", "p.exp() * -q"),
        ("x.masked_fill(~seen, UNSEEN)", "x"),
        (".masked_fill(~seen, UNSEEN), dim=3)", ".masked_fill(~seen, UNSEEN), dim=2)"),
        (".sum(dim=3).mean(dim=1)", ".sum(dim=3).sum(dim=1)"),
        (".sum(dim=3).mean(dim=1)", ".mean(dim=3).mean(dim=1)"),
        ("over_tokens(tokens, mask_BT)", "over_tokens(tokens, None)"),
        ("pairs(s, mask_BT, causal)", "pairs(s, mask_BT, False)"),
        ("for i, j in ((0, 1), (2, 2)))", "for i, j in ((0, 1), (1, 1)))"),
        ("for i, j in ((0, 1), (2, 2)))", "for i, j in ((0, 0), (2, 2)))"),
        ("return first + second", "return first"),
        ("        share * minilm_relation", "        minilm_relation"),
        ("parts[0] + parts[1] + parts[2]", "parts[0] + parts[1]"),
        ("parts[0] + parts[1] + parts[2]", "parts[0] + parts[2]"),
        ("or a_BTD.shape[2] % heads:", "or False:"),
        ("a_BTD.shape != b_BTD.shape", "False"),
        ('    same_axes("minilm", s, t, "B, heads, T, T", 0, 2)\n', ""),
    ]),
    "../training/terms.py": ("test_terms.py", [
        ("losses.hard_labels(logits, labels, term.label_smoothing, weights)", "losses.hard_labels(logits, labels, 0, weights)"),
        ("losses.hard_labels(logits, labels, term.label_smoothing, weights)", "losses.hard_labels(logits, labels, term.label_smoothing)"),
        ("losses.soft_targets(logits, targets, temperature, weights)", "losses.soft_targets(logits, targets, 1.0, weights)"),
        ("losses.soft_targets(logits, targets, temperature, weights)", "losses.soft_targets(logits, targets, temperature)"),
        ("losses.reverse_kl(logits,", "losses.soft_targets(logits,"),
        ("term.beta, temperature, weights)\n        case terms.Decoupled", "0.5, temperature, weights)\n        case terms.Decoupled"),
        ("term.alpha, term.beta, temperature, weights)", "term.beta, term.alpha, temperature, weights)"),
        ("term.alpha, term.beta, temperature, weights)", "term.alpha, term.beta, temperature)"),
        ("term.beta, term.gamma, temperature)", "term.gamma, term.beta, temperature)"),
        ("term.beta, term.gamma, temperature)", "term.beta, term.gamma)"),
        ("losses.standardised(logits, targets, temperature, weights)", "losses.standardised(logits, targets, temperature)"),
        ("    if isinstance(term, terms.Adapted) and learned is not None:\n", "    if False:\n"),
        ("_scalar(term.distance(student, cached, weights, *more))", "_scalar(term.distance(cached, student, weights, *more))"),
        ("_scalar(term.distance(student, cached, weights, *more))", "_scalar(term.distance(student, cached, None, *more))"),
        ("_DISTANCES[term.distance](student.flatten(1), cached.flatten(1), weights)", "_DISTANCES[term.distance](student.flatten(1), cached.flatten(1))"),
        ("losses.factor_transfer(student, cached, weights)", "losses.factor_transfer(student, cached)"),
        ("_map(student, term.p), _map(cached, term.p), term.squared", "_map(student, 2), _map(cached, 2), term.squared"),
        ("_map(cached, term.p), term.squared, weights)", "_map(cached, term.p), True, weights)"),
        ("_map(cached, term.p), term.squared, weights)", "_map(cached, term.p), term.squared)"),
        ("term.divergence, weights=weights)", "'kl', weights=weights)"),
        ("term.divergence, weights=weights)", "term.divergence)"),
        ("losses.nst(student, cached, weights=weights)", "losses.nst(student, cached)"),
        ("losses.vid(mean, variance, cached, weights)", "losses.vid(mean, variance, cached)"),
        ("temperature=term.temperature, weights=weights)", "weights=weights)"),
        ("temperature=term.temperature, weights=weights)", "temperature=term.temperature)"),
        ("torch.arange(1, len(bank), device=bank.device)", "torch.arange(0, len(bank), device=bank.device)"),
        ("torch.arange(1, len(bank), device=bank.device)", "torch.arange(2, len(bank), device=bank.device)"),
        ("term.distance * distance + term.angle * angle", "distance + term.angle * angle"),
        ("term.distance * distance + term.angle * angle", "term.distance * distance + angle"),
        ("losses.rkd_angle(student, cached) if term.angle > 0 else 0", "losses.rkd_angle(student, cached)"),
        ("term.gamma, term.order)", "term.gamma)"),
        ("term.gamma, term.order)", "order=term.order)"),
        ("losses.pkt(student, cached)", "losses.pkt(cached, student)"),
        ("    if not isinstance(value, Tensor) or value.ndim != 0:\n", "    if not isinstance(value, Tensor):\n"),
        ("probs[:, None] if probs.ndim == 3 else probs", "probs"),
    ]),
    "../schedules.py": ("schedules", [
        ("    _checked(progress)\n    return value", "    return value"),
        ("    return start + (end - start) * _checked(progress)\n", "    return end + (start - end) * _checked(progress)\n"),
        ("(1 + math.cos(math.pi * _checked(progress))) / 2", "(1 + math.cos(math.pi * _checked(progress)))"),
        ("end + (start - end) * (1 + math.cos(", "start + (end - start) * (1 + math.cos("),
        ("(1 + math.cos(math.pi * _checked(progress))) / 2", "(1 - _checked(progress))"),
        ("min(1.0, _checked(progress) / until)", "_checked(progress) / until"),
        ("_checked(progress) / until)", "_checked(progress))"),
        (" if until > 0 else constant(progress, value)", ""),
        ("_checked(progress) < after", "_checked(progress) <= after"),
        ("else 0.0", "else value"),
        ("    if not 0 <= progress <= 1:\n", "    if not progress <= 1:\n"),
        ("    if not 0 <= progress <= 1:\n", "    if not 0 <= progress:\n"),
    ]),
    "logits.py": ("test_losses.py|targets|classes|weighted|formulas", [
        ("mean(temperature**2 * forward_kl(", "mean(forward_kl("),
        ("mean(temperature**2 * forward_kl(", "mean(temperature * forward_kl("),
        ("    return expected(p, p) - expected(p, q)\n", "    return expected(q, q) - expected(q, p)\n"),
        ("    return expected(p, p) - expected(p, q)\n", "    return -expected(p, q)\n"),
        ("        return -expected(p, q) - own\n", "        return -expected(p, q)\n"),
        ("        return -expected(p, q) - own\n", "        return expected(p, p) - expected(p, q)\n"),
        ("mean(temperature**2 * (expected(q, q)", "mean((expected(q, q)"),
        ("(expected(q, q) - expected(q, p.clamp(min=-30)))", "(expected(p, p) - expected(p, q))"),
        ("(expected(q, q) - expected(q, p.clamp(min=-30)))", "(-expected(q, p.clamp(min=-30)))"),
        ("p.clamp(min=-30)", "p"),
        ("p.clamp(min=-30)", "p.clamp(min=-3)"),
        ('    refuse_sample(targets, "the reverse KL")\n', ""),
        ("    if not 0 < beta < 1:\n", "    if False:\n"),
        ('    refuse_sample(targets, "the Jensen-Shannon divergence")\n', ""),
        ("torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))", "torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))"),
        ("torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))", "(p + q) / 2"),
        ("rows = beta * (expected(p, p)", "rows = (1 - beta) * (expected(p, p)"),
        (" + (1 - beta) * (expected(q, q) - expected(q, m))", ""),
        ("(1 - beta) * (expected(q, q) - expected(q, m))", "(1 - beta) * (expected(q, q) - expected(p, m))"),
        ("mean(temperature**2 * rows, weights)", "mean(rows, weights)"),
        ("label_smoothing=label_smoothing, ", ""),
        ("student_logits_BC.float(), labels_B", "-student_logits_BC.float(), labels_B"),
        ("        return rows_B.mean()\n", "        return rows_B.sum()\n"),
        (" / weights_B.sum().clamp(min=1e-12)", " / len(rows_B)"),
        (".clamp(min=1e-12)", ""),
        ("held = targets.at(temperature)", "held = targets"),
        ("torch.log_softmax(student_logits_BC.float() / temperature, dim=1)", "torch.log_softmax(student_logits_BC.float(), dim=1)"),
        ("torch.log_softmax(student_logits_BC.float() / temperature, dim=1)", "student_logits_BC.float() / temperature"),
        ("student_logits_BC.float() / temperature", "student_logits_BC / temperature"),
        ("kept, others = bucketed_log_probs(student_logits_BC, held.ids, temperature)", "kept, others = bucketed_log_probs(student_logits_BC, held.ids)"),
        ("torch.cat([held.logprobs, held.residual.log()[:, None]], dim=1)", "torch.cat([held.logprobs, held.residual[:, None]], dim=1)"),
        ("torch.cat([kept, others[:, None]], dim=1)", "torch.cat([kept, torch.log1p(-kept.exp().sum(1, keepdim=True)).detach()], dim=1)"),
        ("    nothing = p.isneginf()\n", "    nothing = torch.zeros_like(p, dtype=torch.bool)\n"),
        ("values.masked_fill(nothing, 0.0)", "values"),
        ("p.masked_fill(nothing, 0.0).exp()", "p.masked_fill(nothing, 0.0)"),
        ('    if targets.kind == "unbiased":\n        raise', "    if False:\n        raise"),
    ]),
    "bucketed.py": ("kept|sample|others|sparse", [
        ("top = logits.amax(dim=1, keepdim=True).float() / temperature", "top = torch.zeros_like(logits[:, :1].float())"),
        ("                _zero(e, ids - first)\n", ""),
        ("ids - first)", "ids)"),
        ("log_total = total.log().float() + top[:, 0]", "log_total = total.log().float()"),
        ("log_others = others.log().float() + top[:, 0] if", "log_others = others.log().float() if"),
        ("(few := others < 1e-30)", "(few := others < -1)"),
        ("            log_others[few] = torch.logsumexp(left, dim=1)\n", "            log_others[few] = torch.logsumexp(left, dim=1) + 1\n"),
        ("left = (logits[few].float() / temperature)", "left = (logits[few].float() * temperature)"),
        (".scatter(1, ids[few], -math.inf)", ""),
        ("logits.gather(1, ids).float() / temperature - log_total[:, None], log", "logits.gather(1, ids).float() - log_total[:, None], log"),
        ("/ temperature - log_total[:, None], log_others - log_total", "/ temperature - log_total[:, None], log_others"),
        ("both = (kept.sum(dim=1) + others)[:, None]", "both = (kept.sum(dim=1))[:, None]"),
        ("both = (kept.sum(dim=1) + others)[:, None]", "both = others[:, None]"),
        ("(apart > 80).any()", "(apart > 1e9).any()"),
        ("scale = others[:, None] * apart.exp()[:, None] - both if ctx.rest and usual else -both", "scale = -both"),
        ("_exp(logits, first, log_total[:, None], ctx.temperature).mul_(scale / ctx.temperature)", "_exp(logits, first, log_total[:, None], ctx.temperature).mul_(scale)"),
        ("part += share.mul_(others[:, None] / ctx.temperature)", "part += share"),
        ("grad.scatter_(1, ids, (-both * q / ctx.temperature).to(grad.dtype))", "pass"),
        ("(-both * q / ctx.temperature)", "(-both * q)"),
        ("(-both * q / ctx.temperature)", "(both * q / ctx.temperature)"),
        ("grad.scatter_add_(1, ids, (kept / ctx.temperature).to(grad.dtype))", "pass"),
        ("grad.scatter_add_(1, ids,", "grad.scatter_(1, ids,"),
        ("(kept / ctx.temperature)", "kept"),
        ("chunk.float() / temperature if temperature != 1 else chunk", "chunk.float()"),
        ("inside = (ids >= 0) & (ids < width)", "inside = (ids > 0) & (ids < width)"),
        ("        values[row, ids[row, entry]] = 0\n", "        pass\n"),
    ]),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="mutations whose file or text this is found in")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page of the figures here")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep what was noticed here, and go on from it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, trial = time.monotonic(), Trial(re.compile(args.only), args.state)
    files = [str(ROOT / "tests" / name) for name in TESTS]
    pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", "-k", "not compile", *files], plugins=[trial])
    if trial.broken or not trial.found:
        sys.exit(trial.broken or "no mutation fits")
    survivors = [key for key, test in trial.found.items() if not test]
    print(f"{len(trial.found)} mutations, {len(survivors)} survived")
    if args.write:
        command = f"python benchmarks/mutate_losses.py {shlex.join(sys.argv[1:])}"
        args.write.write_text(page(survivors, command, time.monotonic() - start))
    sys.exit(bool(survivors))


class Trial:
    """A plugin of pytest: in place of one run of the collected tests, one for each mutation."""

    def __init__(self, only: re.Pattern[str], state: Path | None) -> None:
        self.only, self.state, self.broken = only, state, ""
        kept = json.loads(state.read_text()) if state and state.exists() else []
        self.noticed = {tuple(key): test for key, test in kept if test}
        self.found: dict[tuple[str, str, str], str] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        answer = forked(lambda: json.dumps(times(session.items)))
        seconds = json.loads(answer) if answer.startswith("{") else {}
        if len(seconds) < len(session.items):
            broken = next(i.nodeid for i in session.items if i.nodeid not in seconds) if seconds else answer
            self.broken = f"{broken} fails without a mutation"
            return True
        for name, (first, mutations) in MUTATIONS.items():
            fit = re.compile(first)
            items = sorted(session.items, key=lambda i, fit=fit: (not fit.search(i.nodeid), seconds[i.nodeid]))
            for old, new in mutations:
                if self.only.search(f"{name} {old} {new}"):
                    self.one(items, name, old, new)
        return True

    def one(self, items: list[pytest.Item], name: str, old: str, new: str) -> None:
        key = (name, old, new)
        test = self.noticed.get(key) or forked(lambda: noticing(items, *key))
        self.found[key] = test
        os.write(2, f"{len(self.found)} {name}: {old!r} → {new!r}: {test or 'SURVIVED'}\n".encode())
        if self.state:
            self.state.write_text(json.dumps(list((self.noticed | self.found).items()), indent=1))


def forked(work: Callable[[], str]) -> str:
    """What a process of its own answers, or how it ended without an answer."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(SECONDS)  # a mutant that never ends is noticed
        os.write(write, work().encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return text or (f"exit {code}" if code else "")


def times(items: list[pytest.Item]) -> dict[str, float]:
    """Seconds of each test, up to the first that fails, over code exchanged for the same code."""
    for name in MUTATIONS:
        mutate(module(name), "", "")
    found = {}
    for item in items:
        start = time.process_time()
        if any(report.failed for report in runtestprotocol(item, log=False)):
            break
        found[item.nodeid] = time.process_time() - start
    return found


def noticing(items: list[pytest.Item], name: str, old: str, new: str) -> str:
    """The first test that fails with the mutation, or "" if all pass."""
    mutate(module(name), old, new)
    for item in items:
        if any(report.failed for report in runtestprotocol(item, log=False)):
            return item.nodeid.rpartition("/")[2]
    return ""


def module(name: str) -> ModuleType:
    home = "ensemble_distill" if name.startswith("../") else "ensemble_distill.losses"
    return importlib.import_module(f"{home}.{name.removeprefix('../').removesuffix('.py').replace('/', '.')}")


def mutate(module: ModuleType, old: str, new: str) -> None:
    """Give the functions of a module the code, and the module the constants, of its changed source."""
    assert module.__file__
    changed = vars(module).copy()
    exec(compile(Path(module.__file__).read_text().replace(old, new), module.__file__, "exec"), changed)
    for name, value in changed.items():
        held = vars(module).get(name)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for key, inner in vars(value).items():
                exchange(vars(held)[key], inner)
        elif isinstance(value, int | float):
            setattr(module, name, value)
        else:
            exchange(held, value)


def exchange(held: Any, changed: Any) -> None:
    """All who hold the function hold the changed one from now on."""
    held, changed = (inspect.unwrap(getattr(f, "__func__", f)) for f in (held, changed))
    if isinstance(held, FunctionType) and held.__module__ == changed.__module__:
        held.__code__, held.__defaults__ = changed.__code__, changed.__defaults__


def check() -> None:
    """Each text stands in its file once, and what takes its place can be compiled."""
    for name, (_, mutations) in MUTATIONS.items():
        source = (ROOT / "ensemble_distill" / "losses" / name).read_text()
        for old, new in mutations:
            if source.count(old) != 1:
                sys.exit(f"{name}: stands {source.count(old)} times and not once: {old!r}")
            compile(source.replace(old, new), name, "exec")


def page(survivors: list[tuple[str, str, str]], command: str, seconds: float) -> str:
    rows = [(name, len(mutations), sum(s[0] == name for s in survivors)) for name, (_, mutations) in MUTATIONS.items()]
    rows.append(("all", sum(r[1] for r in rows), len(survivors)))
    table = "\n".join(f"| {name} | {count} | {count - lived} | {lived} |" for name, count, lived in rows)
    left = "\n".join(f"- {name}: `{old.strip()}` → `{new.strip()}`" for name, old, new in survivors)
    return f"""# Mutations of the losses

Each term of each loss in `ensemble_distill/losses` was changed in turn (a T² dropped, a KL turned around, a norm or a
mask forgotten, a side detached, a guard removed), and the tests of the losses were run over the result. Written by

    {command}

on {platform.system()} {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, in
{seconds / 60:.0f} minutes. Changes that are none in mathematics (the gradient through a factor that cancels, the sum
over the other side of a symmetric matrix) are not in the list.

| file | mutations | noticed by a test | survived |
|---|---|---|---|
{table}

## Survivors

{left or "None."}
"""


if __name__ == "__main__":
    check()
    main()
