"""A forger of caches: edits a small one as a stranger could, makes every hash right again, and looks on.

What a stranger's cache does is seen in a forked child with an alarm and a limit of address space, so that a crash,
a hang or a flood of memory is a finding and the parent lives.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from small import file_of

import ensemble_distill.formats.hdf5
import ensemble_distill.formats.parquet  # noqa: F401  both before any fork
from ensemble_distill.cache.groups import Group
from ensemble_distill.cache.opening import open_cache
from ensemble_distill.cache.plan import Plan
from ensemble_distill.cache.verify import verify
from ensemble_distill.codec import Dense, Features
from ensemble_distill.errors import Error
from ensemble_distill.fingerprint import canonical_json, sha256
from ensemble_distill.formats import SUFFIX
from ensemble_distill.recording.seal import seal
from ensemble_distill.store import records
from ensemble_distill.store.store import open_store, page_of
from ensemble_distill.training import checkpoint

torch.set_num_threads(1)

SECONDS = 10
MEMORY = 64 << 20  # what the reader is told it may keep
GROWTH = 256 << 20  # what it may take at its peak
ROOM = 3 << 30  # address space beyond what the child begins with
CODES = {2, 3, 4, 5, 6, 8}
CANARY = "the-canary-sings-9b1f"
PARTS = ("objects", "keys", "commits", "pages", "plans", "manifests")

Files = dict[str, bytes]


# A small cache ----------------------------------------------------------------------------------------


def a_plan(format: str = "hdf5") -> Plan:
    """Two splits, two views of one of them, a group of targets and a group of two taps: fourteen units."""
    taps = {f"tap/{m}.pool": Features(width=2) for m in "ab"}
    return Plan.model_validate(
        {
            "reading": {
                "classes": ["x", "y", "z"],
                "heads": {"main": 3},
                "combine": "mean_probs",
                "temperature_before": [1.0],
                "temperature_after": 1.0,
                "views": {},
            },
            "capture": {
                "members": [{"name": "a", "weights": "w", "structure": "s", "share": 1.0}],
                "precision": "fp32",
                "batch_size": 4,
                "audit": [{"sample": 0, "key": "0" * 32, "view": 1, "shape": [1, 2, 2], "cells": "00ff80ff"}],
            },
            "format": format,
            "splits": {
                "train": {"rows": 10, "views": 2, "unit_rows": 4, "labels": None},
                "test": {"rows": 3, "views": 1, "unit_rows": 4, "labels": None},
            },
            "groups": [Group.of("targets", {"main": Dense(classes=3)}), Group.of("tap", taps)],
        }
    )


def make(root: Path, format: str = "hdf5") -> Path:
    """A sealed cache of ``a_plan`` with drawn contents, written by the package itself."""
    plan, store, rng = a_plan(format), open_store(root, create=True), np.random.default_rng(7)
    digest = store.put_plan(plan)
    pages: dict[tuple[str, int], str] = {}
    for item in plan.items():
        if item.view == 0:
            keys = rng.integers(0, 256, (item.rows, 16), dtype=np.uint8)
            pages[item.split, item.page] = store.put_keys(item.split, item.page, keys)
        for group in plan.groups:
            rows = np.zeros(item.rows, group.dtype)
            for field in group.fields:
                rows[field.name] = -rng.random((item.rows, *field.shape))
            store.put_unit(digest, item.unit(group), rows, format, pages[item.split, item.page], None, {"time": "t"})
    seal(plan, digest, store)
    return root


def files_of(root: Path) -> Files:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def lay(root: Path, files: Files, held: Files | None = None) -> Files:
    """Make the folder hold these files, given those that it holds; returns ``files``."""
    if held is None:
        shutil.rmtree(root, ignore_errors=True)
        for part in PARTS:
            (root / part).mkdir(parents=True)
    for name in (held or {}).keys() - files.keys():
        (root / name).unlink()
    for name, data in files.items():
        if held is None or held.get(name) != data:
            (root / name).write_bytes(data)
    return files


class Forge:
    """A cache in parts. Edit them; ``files`` gives what a stranger would send, every digest recomputed.

    ``lies`` overrides fields of a commit after its digests were computed; ``text`` edits the bytes of a record
    ("plan", "commit", "page", "manifest") before they are hashed; ``pointers`` replaces PLAN and CURRENT.
    """

    def __init__(self, base: Files) -> None:
        pointer = {name: base[name].decode().strip() for name in ("PLAN", "CURRENT")}
        self.plan = json.loads(base[f"plans/{pointer['PLAN']}.json"])
        self.manifest = json.loads(base[f"manifests/{pointer['CURRENT']}.json"])
        page = json.loads(base[f"pages/{self.manifest['pages'][0]}.json"])
        self.commits: dict[str, dict[str, Any]] = {c["unit"]: c for c in page["commits"]}
        self.shards = {unit: base[f"objects/{c['object']}"] for unit, c in self.commits.items()}
        self.keys = {name: data for name, data in base.items() if name.startswith("keys/")}
        self.lies: dict[str, dict[str, Any]] = {}
        self.manifest_lies: dict[str, Any] = {}
        self.text: dict[str, Callable[[bytes], bytes]] = {}
        self.pages: Callable[[list[str]], list[str]] = lambda pages: pages
        self.pointers: dict[str, bytes] = {}
        self.own_commits = True

    def copy(self) -> Forge:
        return copy.deepcopy(self)

    @property
    def unit(self) -> str:
        return "train-v000000-00000000.targets"

    def refill(self, value: float = 0) -> None:
        """Encode every unit anew, of constant rows in the dtype that the plan now says."""
        groups = {
            g["name"]: [(f["name"], f["dtype"], tuple(f["shape"])) for f in g["fields"]] for g in self.plan["groups"]
        }
        for unit, commit in self.commits.items():
            fields = groups.get(unit.partition(".")[2])
            if fields is not None:
                rows = np.zeros(commit["rows"], np.dtype(fields, align=True))
                for name, *_ in fields:
                    rows[name] = value
                self.shards[unit], segments = file_of(self.plan["format"], rows)
                commit["segments"] = [s.model_dump(mode="json") for s in segments]

    def files(self) -> Files:
        def edited(kind: str, data: bytes) -> bytes:
            return self.text.get(kind, lambda data: data)(data)

        result: Files = dict(self.keys)
        plan = edited("plan", canonical_json(self.plan))
        plan_digest = sha256(plan)
        result[f"plans/{plan_digest}.json"] = plan
        suffix = SUFFIX.get(str(self.plan.get("format")), ".h5")
        bodies = []
        for unit, commit in self.commits.items():
            data = self.shards[unit]
            blocks = records.block_hashes(data)
            split, page = page_of(unit)
            keys = self.keys.get(f"keys/{split}-{page:08d}", b"")
            name = records.root_hash(blocks) + suffix
            body = commit | {"plan": plan_digest, "object": name, "size": len(data), "blocks": list(blocks)}
            body |= {"keys": sha256(keys)} | self.lies.get("*", {}) | self.lies.get(unit, {})
            text = canonical_json(body)
            text = edited("commit", text) if unit == self.unit else text
            bodies.append(text)
            result[f"objects/{name}"] = data
            if self.own_commits:
                result[f"commits/{unit}.json"] = records.sealed(text)
        digests = []
        for first in range(0, len(bodies), records.PAGE_UNITS):
            page_text = edited("page", records.page(bodies[first : first + records.PAGE_UNITS]))
            digests.append(sha256(page_text))
            result[f"pages/{digests[-1]}.json"] = page_text
        manifest = self.manifest | {"plan": plan_digest, "units": self.units(), "pages": self._padded(digests)}
        text = edited("manifest", canonical_json(manifest | self.manifest_lies))
        result[f"manifests/{sha256(text)}.json"] = text
        result["PLAN"], result["CURRENT"] = f"{plan_digest}\n".encode(), f"{sha256(text)}\n".encode()
        return result | self.pointers

    def units(self) -> int:
        """What a manifest must say for the plan as it is, as far as that makes sense."""
        try:
            items = sum(s["views"] * -(-s["rows"] // s["unit_rows"]) for s in self.plan["splits"].values())
            return int(items * len(self.plan["groups"]))
        except (ZeroDivisionError, TypeError, KeyError, AttributeError):
            return len(self.commits)

    def _padded(self, digests: list[str]) -> list[str]:
        count = -(-self.units() // records.PAGE_UNITS)
        if len(digests) < count <= 1 << 16:
            digests = digests + digests[-1:] * (count - len(digests))
        return self.pages(digests)


# What becomes of it -----------------------------------------------------------------------------------


def outcome(look: Callable[[], str]) -> dict[str, Any]:
    """How it ended: a digest of what was read, or an Error, or (a finding) any other exception."""
    try:
        return {"end": "read", "digest": look()}
    except Error as error:
        return {"end": "refused", "code": error.exit_code, "message": f"{error} {error.hint}"[:4000]}
    except BaseException as error:
        where, trace = "", error.__traceback__
        while trace is not None:
            where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        return {"end": "bug", "message": f"{type(error).__name__} at {where}: {error}"[:1000]}


def see_table(path: Path) -> str:
    cache, digest = open_cache(path, memory=MEMORY), hashlib.sha256()
    for split in sorted(cache.plan.splits):
        digest.update(cache.table(split).keys.tobytes())
    return digest.hexdigest()


def see_targets(path: Path) -> str:
    """Rows of every split in its first and its last view, without the key table."""
    cache, digest = open_cache(path, memory=MEMORY), hashlib.sha256()
    for name, split in sorted(cache.plan.splits.items()):
        rows = np.arange(min(split.rows, 64))
        for view in {0, split.views - 1} if split.rows else ():
            targets = cache.targets_at(rows, view, split=name, taps=cache.taps)
            digest.update(targets.logprobs.contiguous().view(torch.uint8).numpy().tobytes())
            for tap in sorted(targets.features):
                digest.update(targets.features[tap].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def see_verify(path: Path) -> str:
    verdict = verify(open_store(path))
    if not verdict.ok:
        raise Damaged(f"{len(verdict.damaged)}: " + "; ".join(map(str, verdict.damaged[:20])))
    return "ok"


class Damaged(Error):
    """What the command line says after a verdict that is not ok."""

    exit_code = 4


def see_checkpoint(path: Path) -> str:
    loaded = checkpoint.load(checkpoint.LocalStorage(path))
    if loaded is None:
        return "none"
    state, tensors = loaded
    digest = hashlib.sha256(records.dump(state))
    for name in sorted(tensors):
        raw = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode() + raw)
    return digest.hexdigest()


LOOKS = {"table": see_table, "targets": see_targets, "verify": see_verify}


def watch(jobs: Iterator[Callable[[], Any]] | list[Callable[[], Any]], seconds: int = SECONDS) -> list[dict[str, Any]]:
    """What each job returned, run in turn in one forked child; its peak growth in bytes, and whether it lived.

    When the child dies, the last entry says how and the rest was not run.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _child(jobs, writing, seconds)
        finally:
            os._exit(0)
    os.close(writing)
    text, deadline = b"", time.monotonic() + seconds + 5
    while select.select([reading], [], [], max(0, deadline - time.monotonic()))[0]:
        part = os.read(reading, 1 << 20)
        if not part:
            break
        text += part
        deadline = time.monotonic() + seconds + 5
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    found = [json.loads(line) for line in text.splitlines() if line.startswith(b"{") and line.endswith(b"}")]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        end = "hung" if number in (signal.SIGALRM, signal.SIGKILL) else "crashed"
        found.append({"value": {"end": end, "message": signal.Signals(number).name}, "growth": 0, "seconds": seconds})
    return found


def _child(jobs: Iterator[Callable[[], Any]] | list[Callable[[], Any]], writing: int, seconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    room = _status("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_no_code)
    for job in jobs:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start = _status("VmRSS"), time.monotonic()
        signal.alarm(seconds)
        value = job()
        signal.alarm(0)
        line = {"value": value, "growth": _status("VmHWM") - before, "seconds": round(time.monotonic() - start, 3)}
        os.write(writing, json.dumps(line).encode() + b"\n")


def _no_code(event: str, args: tuple[object, ...]) -> None:
    """No reader of a cache has a reason to do any of this."""
    if event in (
        "pickle.find_class",
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "socket.connect",
        "socket.getaddrinfo",
    ):
        raise AssertionError(f"{event}{args}"[:200])


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) << 10


# Mutations --------------------------------------------------------------------------------------------

EXTREMES: list[Any] = [
    -1, 0, 1, 2, 255, 2**15, 2**24, 2**28, 2**31 - 1, 2**31, 2**32, 2**40, 2**48, 2**53, 2**63 - 1, 2**63, 2**64,
    -(2**63), 10**18, 10**30, 10**400, 0.5, -0.0, 1e308, True, None, "", "x", "../" * 8 + "etc/passwd", "/etc/passwd",
    "\0", "\x1b[2J", "x" * 5000, "é", [], {}, [[]], [0] * 300, {"": 0}, "0" * 64, "targets", "train", "<f2", "|O",
]  # fmt: skip


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four of: a bit flipped, a run overwritten, cut, inserted, copied from elsewhere, an extreme integer."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, len(out) + 1))
        run = int(2 ** rng.uniform(0, 7))
        kind = int(rng.integers(0, 7))
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            out[at : at + run] = rng.bytes(len(out[at : at + run]))
        elif kind == 2:
            del out[at:]
        elif kind == 3:
            del out[at : at + run]
        elif kind == 4:
            out[at:at] = rng.bytes(run)
        elif kind == 5:
            source = int(rng.integers(0, len(out) + 1))
            out[at : at + run] = out[source : source + run]
        else:
            number = int(rng.choice([0, 0xFF, 0x7F, 0x80]))
            width = int(rng.choice([1, 2, 4, 8]))
            out[at : at + width] = bytes([number]) * min(width, len(out) - at)
    return bytes(out)


def mutate_json(data: bytes, rng: np.random.Generator) -> bytes:
    """Canonical JSON with one to three values replaced by extremes or by each other, removed or added."""
    value = json.loads(data)
    for _ in range(int(rng.integers(1, 4))):
        try:
            places = list(_places(value))
        except RecursionError:  # of the mutation before, which is as deep as Python goes: enough
            break
        if not places:
            break
        parent, key = places[int(rng.integers(0, len(places)))]
        kind = int(rng.integers(0, 5))
        # A copy, or the next mutation may put a value into itself. Some are too deep for copy.deepcopy.
        extreme = json.loads(json.dumps(EXTREMES[int(rng.integers(0, len(EXTREMES)))]))
        if kind == 0:
            del parent[key]
        elif kind == 1:
            other, name = places[int(rng.integers(0, len(places)))]
            parent[key] = copy.deepcopy(other[name])
        elif kind == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        elif kind == 2:
            parent[f"{key}x"] = extreme
        else:
            parent[key] = extreme
    try:
        return canonical_json(value)
    except RecursionError:
        return data


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield value, key
        yield from _places(child)


KINDS = ("hdf5", "parquet", "plan", "manifest", "page", "commit", "keys", "checkpoint")


class Fuzz:
    """Seeded mutations of one kind of file, half of them under hashes that are right again."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.root = kind, folder / "mutated"
        if kind == "checkpoint":
            self.base = files_of(make_checkpoint(folder / "base"))
            self.looks = {"load": see_checkpoint}
        else:
            self.base = files_of(make(folder / "base", "parquet" if kind == "parquet" else "hdf5"))
            self.looks = LOOKS
            self.forge = Forge(self.base)
        self.right = {name: look(folder / "base") for name, look in self.looks.items()}
        self._held: Files | None = None

    def run(self, seeds: range, batch: int = 50) -> dict[str, Any]:
        """Counts of how the mutations ended, and the findings: (seed, what)."""
        counts = {"same": 0, "other data": 0, "refused": 0}
        findings: list[tuple[int, str]] = []
        slowest, growth, done = 0.0, 0, 0
        todo = list(seeds)
        while todo:
            part = todo[:batch]
            found = watch([lambda seed=seed: self._one(seed) for seed in part])
            self._held = None
            for seed, result in zip(part, found, strict=False):
                done += 1
                end = result["value"]["end"]
                if end in counts:
                    counts[end] += 1
                else:
                    findings.append((seed, f"{end}: {result['value']['message']}"))
                if result["growth"] > GROWTH:
                    findings.append((seed, f"grew by {result['growth'] >> 20} MiB"))
                slowest, growth = max(slowest, result["seconds"]), max(growth, result["growth"])
            if not found:
                findings.append((part[0], "the child ended without a result"))
                done += 1
            todo = todo[max(1, len(found)) :]
        return counts | {"findings": findings, "slowest": slowest, "growth": growth, "mutations": done}

    def _one(self, seed: int) -> dict[str, Any]:
        rng = np.random.default_rng([KINDS.index(self.kind), seed])
        files, forged = self.mutated(rng)
        self._held = lay(self.root, files, self._held)
        ends = {name: outcome(lambda look=look: look(self.root)) for name, look in self.looks.items()}
        for name, end in ends.items():
            if end["end"] == "bug" or (end["end"] == "refused" and end["code"] not in CODES):
                return {"end": "bug", "message": f"{name}: {end.get('code', '')} {end['message']}"}
            if end["end"] == "read" and end["digest"] != self.right[name] and not forged:
                return {"end": "bug", "message": f"{name}: other data under hashes that are not theirs"}
        if any(end["end"] == "refused" for end in ends.values()):
            return {"end": "refused"}
        same = all(end["digest"] == self.right[name] for name, end in ends.items())
        return {"end": "same" if same else "other data"}

    def mutated(self, rng: np.random.Generator) -> tuple[Files, bool]:
        """The files, and whether their hashes are right."""
        forged = bool(rng.integers(0, 2))
        if self.kind == "checkpoint":
            return self._checkpoint(rng, forged), forged
        if not forged:
            folder = {"hdf5": "objects/", "parquet": "objects/"}.get(self.kind, f"{self.kind}".rstrip("s") + "s/")
            names = [name for name in self.base if name.startswith(folder)]
            name = names[int(rng.integers(0, len(names)))]
            return self.base | {name: mutate_bytes(self.base[name], rng)}, False
        forge = self.forge.copy()
        if self.kind in ("hdf5", "parquet"):
            units = sorted(forge.shards)
            unit = units[int(rng.integers(0, len(units)))]
            forge.shards[unit] = mutate_bytes(forge.shards[unit], rng)
        elif self.kind == "keys":
            name = sorted(forge.keys)[int(rng.integers(0, len(forge.keys)))]
            forge.keys[name] = mutate_bytes(forge.keys[name], rng)
        else:
            forge.text[self.kind] = _by_chance(rng)
        return forge.files(), True

    def _checkpoint(self, rng: np.random.Generator, forged: bool) -> Files:
        name = next(name for name in self.base if name.endswith(".safetensors"))
        record = bool(rng.integers(0, 2))
        if not forged:
            name = "checkpoint.json" if record else name
            return self.base | {name: mutate_bytes(self.base[name], rng)}
        body = self.base["checkpoint.json"].partition(b"\n")[2]
        if record:
            return self.base | {"checkpoint.json": records.sealed(_by_chance(rng)(body))}
        data = mutate_safetensors(self.base[name], rng)
        body = canonical_json(json.loads(body) | {"sha256": sha256(data)})
        return self.base | {name: data, "checkpoint.json": records.sealed(body)}


def _by_chance(rng: np.random.Generator) -> Callable[[bytes], bytes]:
    return lambda data: (mutate_json if rng.integers(0, 4) else mutate_bytes)(data, rng)


def mutate_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes anywhere, or values of the header under a right length."""
    if rng.integers(0, 2):
        return mutate_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def make_checkpoint(root: Path) -> Path:
    root.mkdir(parents=True)
    state = checkpoint.State(
        step=3, epoch=1, batch=2, sums={"loss": 0.5}, best={"accuracy": 0.5}, best_sha256="", history=({"epoch": 0},),
        finished=False, config="0" * 64,
    )  # fmt: skip
    tensors = {"student/w": torch.arange(6.0).reshape(2, 3), "optimizer/0/step": torch.tensor(3.0)}
    checkpoint.save(checkpoint.LocalStorage(root), state, tensors)
    return root
