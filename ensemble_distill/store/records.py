"""The records of a store as JSON: commits, manifest pages, manifests; strict to read, canonical to write."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import FailFast, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from ensemble_distill.errors import Corrupt, Mismatch
from ensemble_distill.explain import explain
from ensemble_distill.fingerprint import canonical_json, sha256
from ensemble_distill.formats.layout import Segment
from ensemble_distill.frozen import Config, without_empty

BLOCK = 1 << 20
PAGE_UNITS = 4096
SCHEMA = 1

# The largest that a stranger's record may be; what the tool writes is a hundredth of it.
MAX_PLAN = 8 << 20
MAX_COMMIT = 1 << 20
MAX_MANIFEST = 8 << 20
MAX_PAGES = 1 << 16

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Commit(Config):
    """One unit is here: which object holds it, where in it the rows lie, and the hashes of both.

    ``blocks`` hash the file's bytes in blocks of 1 MiB and ``object``, their root, names it; ``content``
    hashes the logical content (field bytes, little-endian, row order), alike for all formats; ``keys``
    hashes the slice of the key table that the rows belong to.
    """

    plan: str
    unit: str
    object: str = Field(pattern=r"^[0-9a-f]{64}\.(h5|parquet)$")
    size: int = Field(ge=0)
    rows: int = Field(ge=0)
    segments: Annotated[tuple[Segment, ...], FailFast(), Field(max_length=1024)]
    blocks: Annotated[tuple[Digest, ...], FailFast(), Field(max_length=8192)]
    content: str
    keys: Digest
    statistics: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}


class Page(Config):
    commits: Annotated[tuple[Commit, ...], FailFast(), Field(max_length=PAGE_UNITS)]


class Manifest(Config):
    """What was sealed: a plan, the pages of its commits in the order of its units, and what they add up to.

    ``parent``: the digest of the manifest that this one was appended to.
    """

    schema_version: Literal[1] = 1
    plan: Digest
    pages: Annotated[tuple[Digest, ...], FailFast(), Field(max_length=MAX_PAGES)]
    content_digest: Digest
    units: int
    rows: int
    bytes: int
    statistics: dict[str, Any]
    provenance: dict[str, Any]
    parent: Digest | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_empty(handler(self), "parent")


R = TypeVar("R", bound=Config)


def dump(record: Config) -> bytes:
    return canonical_json(record.model_dump(mode="json"))


def load(kind: type[R], data: bytes, where: str) -> R:
    """Parse a record; Corrupt if it is not the canonical JSON of one, Mismatch if it is of another version.

    Only the bytes that ``dump`` gives are accepted, so a key that stands twice, NaN, spaces or another order
    of keys are refused.
    """
    try:
        record = kind.model_validate_json(data)
        canonical = dump(record) == data
    except ValidationError as error:
        if error.error_count() > 100:  # each would become an object of its own
            raise Corrupt(f"{where}: {error.error_count()} of its values are not what they should be") from error
        for problem in error.errors():
            if problem["loc"] == ("schema_version",):
                raise Mismatch(
                    f"{where}: schema version {problem['input']}, this release reads {SCHEMA}",
                    hint="use the release of ensemble-distill that wrote it",
                ) from error
        raise Corrupt(f"{where}: {explain(error, kind)[:500]}") from error
    except (ValueError, RecursionError) as error:  # such as a number of more digits than Python writes
        raise Corrupt(f"{where}: not the JSON that was written ({error})") from error
    if not canonical:
        raise Corrupt(f"{where}: its bytes are not those that were written")
    return record


def load_hashed(kind: type[R], data: bytes, digest: str, where: str) -> R:
    """The same, for a record whose name or parent says its SHA-256."""
    if sha256(data) != digest:
        raise Corrupt(f"{where} is damaged: its SHA-256 is {sha256(data)[:12]}…, expected {digest[:12]}…")
    return load(kind, data, where)


def seal(record: Config) -> bytes:
    """A record with its own SHA-256 in front: for files whose name cannot say it (commits)."""
    return sealed(dump(record))


def sealed(body: bytes) -> bytes:
    return sha256(body).encode() + b"\n" + body


def unsealed(data: bytes, where: str) -> bytes:
    """The body of a sealed record; Corrupt if it is not the one that was sealed."""
    digest, _, body = data.partition(b"\n")
    if sha256(body).encode() != digest:
        raise Corrupt(f"{where} is damaged: its SHA-256 is {sha256(body)[:12]}…, expected {digest[:12]!r}…")
    return body


def unseal(kind: type[R], data: bytes, where: str) -> R:
    return load(kind, unsealed(data, where), where)


def page(bodies: list[bytes]) -> bytes:
    """The canonical JSON of a Page, from those of its commits."""
    return b'{"commits":[' + b",".join(bodies) + b"]}"


def block_hashes(*parts: bytes | memoryview) -> tuple[str, ...]:
    """The SHA-256 of each MiB of a file, whose bytes may come in parts."""
    hashes, block, room = [], hashlib.sha256(), BLOCK
    for part in parts:
        view = memoryview(part)
        while len(view):
            block.update(view[:room])
            taken, view = min(room, len(view)), view[room:]
            room -= taken
            if room == 0:
                hashes.append(block.hexdigest())
                block, room = hashlib.sha256(), BLOCK
    return (*hashes, block.hexdigest()) if room < BLOCK else tuple(hashes)


def root_hash(blocks: tuple[str, ...]) -> str:
    """The hash of the block hashes, by which an object is named."""
    return sha256("".join(blocks).encode())


def content_hash(records: np.ndarray, tokens: np.ndarray | None = None) -> str:
    """SHA-256 over a unit's logical content: each field's name, dtype, shape and little-endian bytes.

    ``tokens``: of a ragged feature, whose field comes last.
    """
    tables = [records] if tokens is None else [records, tokens]
    parts = []
    for name, values in ((name, table[name]) for table in tables for name in table.dtype.names or ()):
        column = np.ascontiguousarray(values)
        assert column.dtype.byteorder in "<=|"
        parts.append([name, column.dtype.str, list(column.shape), sha256(column.reshape(-1).view(np.uint8).data)])
    return sha256(canonical_json(parts))
