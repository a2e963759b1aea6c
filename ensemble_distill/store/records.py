"""The records of a store as JSON: commits, manifest pages, manifests; strict to read, canonical to write."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from ensemble_distill.config import Config, explain
from ensemble_distill.errors import Corrupt, Mismatch
from ensemble_distill.fingerprint import canonical_json, sha256
from ensemble_distill.formats.layout import Segment

BLOCK = 1 << 20
PAGE_UNITS = 4096
SCHEMA = 1


class Commit(Config):
    """One unit is here: which object holds it, where in it the rows lie, and the hashes of both.

    ``blocks`` hash the file's bytes in blocks of 1 MiB and ``object``, their root, names it; ``content``
    hashes the logical content (field bytes, little-endian, row order), alike for all formats; ``keys``
    hashes the slice of the key table that the rows belong to.
    """

    plan: str
    unit: str
    object: str
    size: int
    rows: int
    segments: tuple[Segment, ...]
    blocks: tuple[str, ...]
    content: str
    keys: str
    statistics: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}


class Page(Config):
    commits: tuple[Commit, ...]


class Manifest(Config):
    """What was sealed: a plan, its units by page, its key pages, what the units add up to."""

    schema_version: Literal[1] = 1
    plan: str
    pages: tuple[str, ...]
    keys: dict[str, tuple[str, ...]]
    content_digest: str
    units: int
    rows: int
    bytes: int
    statistics: dict[str, Any]
    provenance: dict[str, Any]


R = TypeVar("R", bound=Config)


def dump(record: Config) -> bytes:
    return canonical_json(record.model_dump(mode="json"))


def load(kind: type[R], data: bytes, where: str) -> R:
    """Parse a record; Corrupt if it is not the canonical JSON of one, Mismatch if it is of another version."""
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{where}: not the JSON that was written ({error})") from error
    version = value.get("schema_version", SCHEMA) if isinstance(value, dict) else SCHEMA
    if version != SCHEMA:
        raise Mismatch(
            f"{where}: schema version {version}, this release reads {SCHEMA}",
            hint="use the release of ensemble-distill that wrote it",
        )
    try:
        record = kind.model_validate(value)
    except ValidationError as error:
        raise Corrupt(f"{where}: {explain(error, kind)}") from error
    if dump(record) != data:
        raise Corrupt(f"{where}: its bytes are not those that were written")
    return record


def load_hashed(kind: type[R], data: bytes, digest: str, where: str) -> R:
    """The same, for a record whose name or parent says its SHA-256."""
    if sha256(data) != digest:
        raise Corrupt(f"{where} is damaged: its SHA-256 is {sha256(data)[:12]}…, expected {digest[:12]}…")
    return load(kind, data, where)


def seal(record: Config) -> bytes:
    """A record with its own SHA-256 in front: for files whose name cannot say it (commits)."""
    body = dump(record)
    return sha256(body).encode() + b"\n" + body


def unseal(kind: type[R], data: bytes, where: str) -> R:
    digest, _, body = data.partition(b"\n")
    return load_hashed(kind, body, digest.decode("latin-1"), where)


def block_hashes(data: bytes) -> tuple[str, ...]:
    view = memoryview(data)
    return tuple(sha256(view[i : i + BLOCK]) for i in range(0, len(data), BLOCK))


def root_hash(blocks: tuple[str, ...]) -> str:
    """The hash of the block hashes, by which an object is named."""
    return sha256("".join(blocks).encode())


def content_hash(records: np.ndarray) -> str:
    """SHA-256 over a unit's logical content: each field's name, dtype, shape and little-endian bytes."""
    names = records.dtype.names
    assert names
    parts = []
    for name in names:
        column = np.ascontiguousarray(records[name])
        assert column.dtype.byteorder in "<=|"
        parts.append([name, column.dtype.str, list(column.shape), sha256(column.tobytes())])
    return sha256(canonical_json(parts))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
