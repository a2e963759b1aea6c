"""Members that are no modules: served models, functions, all classes or the likeliest only; and members in turn."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ensemble_distill as ed
from ensemble_distill.codec import resolved
from ensemble_distill.codecs.heads import decode, encode, encode_figures
from ensemble_distill.ensemble.distributions import InvalidRow, stated
from ensemble_distill.ensemble.ensemble import Ensemble
from ensemble_distill.ensemble.members import load_member
from ensemble_distill.errors import InvalidOutput, UsageError
from ensemble_distill.mixture import Mixture
from ensemble_distill.recording.tail import resolved_tail
from ensemble_distill.targets import Said

CPU = torch.device("cpu")


def ensemble(members: dict[str, Callable[..., object]], classes: int, **fields: object) -> Ensemble:
    config = ed.CacheConfig(
        members=tuple(ed.Member(name=n, build=lambda f=f: f, version="1") for n, f in members.items()), **fields
    )
    return Ensemble([load_member(m) for m in config.members], config, classes, [CPU])


def listing(logprobs: Tensor, k: int) -> ed.TopKLogProbs:
    """What a server that gives k classes would say of these."""
    top = logprobs.topk(k, dim=1)
    return ed.TopKLogProbs(top.indices, top.values)


# Top-k distributions: what is exact, and what is not -----------------------------------------------------


def full(seed: int, classes: int, members: int, rows: int = 5) -> list[Tensor]:
    z = torch.randn(members, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    return list(torch.log_softmax(z, dim=2))


@given(st.integers(0, 10**6), st.integers(10, 40), st.integers(0, 2), st.integers(1, 3), st.booleans())
def test_what_is_kept_of_top_k_members_is_exact_whatever_they_do_not_list(
    seed: int, classes: int, dense: int, listed: int, apart: bool
) -> None:
    """Against the mixture of the whole distributions in float64, of which the ensemble saw only the listed part."""
    whole, each = full(seed, classes, dense + listed), classes - 1 - seed % 3
    k = classes - listed * (1 + seed % 3)  # as many as all members list for certain
    said = {f"m{i}": (lambda x, p=p: p.float()) for i, p in enumerate(whole[:dense])}
    said |= {f"t{i}": (lambda x, p=p: listing(p, each)) for i, p in enumerate(whole[dense:])}
    kept = ed.TopK(k=k, values=16, temperatures=())
    codec = resolved(ed.Members(inner=kept) if apart else kept, classes, tuple(said))
    one = ensemble(said, classes, codec=codec)
    out = one({"x": torch.zeros(5, 1)})
    what = Said(out.logprobs, out.members, one.config.shares, None, np.zeros((5, 16), np.uint8), 0, out.known)
    mixture = Mixture(tuple(zip(said, one.config.shares, strict=True)), "mean_probs")
    found = decode(codec, encode(codec, what), mixture)
    truth = torch.stack(whole).exp().mean(0).gather(1, found.ids)
    torch.testing.assert_close(found.logprobs.double().exp(), truth, atol=1e-5, rtol=4e-3)
    torch.testing.assert_close(found.residual.double(), 1 - truth.sum(1), atol=1e-5, rtol=6e-3)


def test_figures_that_cannot_be_known_are_nan() -> None:
    whole = full(0, 6, 2)
    said = {"a": lambda x: whole[0].float(), "b": lambda x: listing(whole[1], 3)}
    out = ensemble(said, 6, codec=ed.TopK(k=3, temperatures=()))({"x": torch.zeros(5, 1)})
    labels = torch.tensor([int(i) for i in listing(whole[1], 6).ids[:, 2]])
    labels[1] = listing(whole[1], 6).ids[1, 3]  # the first that is not listed
    figures = encode_figures(
        Said(out.logprobs, out.members, [0.5, 0.5], labels, np.zeros((5, 16), np.uint8), 0, out.known)
    )
    assert figures["entropy"].isnan().all() and figures["mutual_information"].isnan().all()
    assert figures["label_logprob"].isnan().tolist() == [False, True, False, False, False]
    truth = torch.stack(whole).exp().mean(0).log().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(figures["label_logprob"][[0, 2, 3, 4]].double(), truth[[0, 2, 3, 4]], atol=0, rtol=2e-3)


def test_a_uniform_tail_is_spread_evenly_over_what_is_not_listed() -> None:
    whole = full(1, 9, 1)[0]
    out = ensemble({"a": lambda x: listing(whole, 4)}, 9, tail="uniform")({"x": torch.zeros(5, 1)})
    listed = torch.zeros(5, 9, dtype=torch.bool).scatter(1, whole.topk(4, dim=1).indices, True)
    rest = (1 - torch.where(listed, whole.exp(), 0.0).sum(1, keepdim=True)) / 5
    expected = torch.where(listed, whole.exp(), rest)
    torch.testing.assert_close(out.logprobs.double().exp(), expected, atol=1e-7, rtol=1e-5)
    assert out.known is None


def test_a_row_may_list_fewer_classes_and_all_of_them() -> None:
    logprobs = torch.tensor([[0.7, 0.2, 0.0], [0.5, 0.3, 0.2]]).log()
    found = stated("a", ed.TopKLogProbs(torch.tensor([[2, 0, 0], [0, 1, 2]]), logprobs), 2, 3)
    torch.testing.assert_close(found.logits.exp(), torch.tensor([[0.2, 0.1, 0.7], [0.5, 0.3, 0.2]]))
    assert found.listed.tolist() == [[True, False, True], [True, True, True]]


HALF = [[0.5, 0.3]]


@pytest.mark.parametrize(
    ("ids", "p", "words"),
    [
        ([[0, 4]], HALF, "class 4, expected 0 to 3"),
        ([[0, -1]], HALF, "class -1, expected 0 to 3"),
        ([[2, 2]], HALF, "class 2 twice"),
        ([[0, 1]], [[0.5, 0.502]], "sum to 1.002, expected 1 at most"),
        ([[0, 1]], [[0.5, float("nan")]], "sum to nan"),
        ([[0, 1]], [[0.5, float("inf")]], "sum to inf"),
        ([[0, 1]], [[0.0, 0.0]], "no class at all"),
        ([[0, 1, 2, 3]], [[0.5, 0.3, 0.1, 0.05]], "all classes, with probabilities that sum to 0.95"),
    ],
)
def test_a_row_that_is_no_top_k_distribution_names_member_and_row(
    ids: list[list[int]], p: list[list[float]], words: str
) -> None:
    k = len(ids[0])
    logprobs = torch.tensor([[1 / k] * k, *p]).log().numpy()  # a good row first
    output = ed.TopKLogProbs(np.array([list(range(k)), *ids]), logprobs)
    with pytest.raises(InvalidRow, match=words) as error:
        stated("member 'a'", output, 2, 4)
    assert error.value.row == 1 and error.value.member == "member 'a'"


@pytest.mark.parametrize("total", [0.998, 1.002, float("nan"), float("inf")])
def test_log_probabilities_that_do_not_sum_to_one_are_refused(total: float) -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, total - 0.25]])
    with pytest.raises(InvalidRow, match="expected 1") as error:
        stated("member 'a'", ed.LogProbs(p.log()), 2, 2)
    assert error.value.row == 1
    found = stated("member 'a'", ed.LogProbs(torch.tensor([[0.4996, 0.4996]]).log().numpy()), 1, 2)
    torch.testing.assert_close(torch.softmax(found.logits, 1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.zeros(2, 3), "expected logits"),
        (torch.zeros(1, 4), "of 1 rows for a batch of 2"),
        (ed.LogProbs(torch.zeros(2, 3)), "expected log-probabilities"),
        (ed.TopKLogProbs(torch.zeros(2, 3), torch.zeros(2, 3)), "torch.float32"),
        (ed.TopKLogProbs(torch.zeros(2, 3).long(), torch.zeros(2, 2)), r"\[2, 2\]"),
        (ed.TopKLogProbs(torch.zeros(1, 3).long(), torch.zeros(1, 3)), r"both \[2, K\]"),
        ("yes", "str"),
    ],
)
def test_what_is_no_output_is_refused(output: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        stated("member 'a'", output, 2, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "the codec dense"),
        ({"codec": ed.VarOpt(k=2)}, "the codec varopt"),
        ({"codec": ed.Sampled(n=2)}, "the codec sampled"),
        ({"codec": ed.Members()}, "the codec dense"),
        ({"codec": ed.TopK(k=2)}, "log_z"),
        ({"codec": ed.Members(inner=ed.TopK(k=2))}, "log_z"),
        ({"codec": ed.TopK(k=2, temperatures=()), "combine": "mean_logits"}, "mean_logits"),
        ({"codec": ed.TopK(k=2, temperatures=()), "temperature": 2}, "temperature=2"),
    ],
)
def test_what_needs_all_classes_is_refused_unless_a_tail_is_chosen(fields: dict[str, object], words: str) -> None:
    members = (ed.Member(name="a", build=nn.Identity), ed.Member(name="b", build=nn.Identity, temperature=1.0))
    with pytest.raises(UsageError, match=f"'b' gives its likeliest classes only, but {words}"):
        resolved_tail(ed.CacheConfig(members=members, **fields), ["all", "topk"])
    config = ed.CacheConfig(members=members, **fields, tail="uniform")
    assert resolved_tail(config, ["all", "topk"]) == "uniform" and resolved_tail(config, ["all", "all"]) is None
    kept = ed.TopK(k=2, temperatures=())
    warm = ed.CacheConfig(members=(members[0], ed.Member(name="b", build=nn.Identity, temperature=2)), codec=kept)
    with pytest.raises(UsageError, match="temperature=2 of 'b'"):
        resolved_tail(warm, ["all", "topk"])
    assert resolved_tail(warm.model_copy(update={"members": members}), ["all", "topk"]) == "unknown"


def test_too_few_classes_in_common_name_members_and_row() -> None:
    one = torch.log_softmax(torch.arange(6.0).expand(3, 6), 1)
    other = torch.cat([one[:2], one[2:].flip(1)])
    said = {"a": lambda x: listing(one, 2), "b": lambda x: listing(other, 2)}
    with pytest.raises(InvalidRow, match="'a' and member 'b' gave only 0 known classes, the codec keeps 2") as error:
        ensemble(said, 6, codec=ed.TopK(k=2, temperatures=()))({"x": torch.zeros(3, 1)})
    assert error.value.row == 2 and "uniform" in error.value.hint


def test_a_member_says_one_kind_of_thing_throughout() -> None:
    whole, calls = full(2, 4, 1)[0].float(), []

    def wavering(x: Tensor) -> object:
        calls.append(len(x))
        of_rows = whole[x[:, 0].long()]
        return of_rows if len(calls) > 2 else listing(of_rows, 2)

    one = ensemble({"a": wavering}, 4, codec=ed.TopK(k=2, temperatures=()))
    one.look({"x": torch.arange(5)[:, None]})
    with pytest.raises(InvalidOutput, match="gave all classes, and its likeliest classes only when"):
        one({"x": torch.arange(5)[:, None]})


def test_precision_is_not_measured_on_what_is_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    function = ed.Member(name="a", build=lambda: lambda x: calls.append(1) or torch.zeros(len(x), 2), version="1")
    config = ed.CacheConfig(members=(function, ed.Member(name="net", build=lambda: nn.Linear(1, 2))))
    one = Ensemble([load_member(m) for m in config.members], config, 2, [CPU])
    assert one.resolve_precision("auto", {"x": torch.zeros(4, 1)}) in ("fp32", "bf16") and not calls
    monkeypatch.setattr("ensemble_distill.ensemble.ensemble.choose_precision", lambda choice, *rest: choice)
    assert ensemble({"a": lambda x: torch.zeros(len(x), 2)}, 2).resolve_precision("auto", {}) == "fp32"


# Through the command line ------------------------------------------------------------------------------

CACHE = ("cache", "served.py", "--out", "cache")
HEADER = """
import json, urllib.request
import numpy as np, torch, ensemble_distill as ed
from digits import HERE, Net, data, train

def net():
    return ed.Member(name="net", build=lambda: Net(48), weights=HERE / "a.safetensors")

def logprobs(image):
    z = image.flatten(1).numpy().astype(np.float64) @ np.cos(np.arange(640)).reshape(64, 10) / 16
    return z - np.log(np.exp(z).sum(1, keepdims=True))

def likeliest(image, k=4):
    p = logprobs(image)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(p, ids, axis=1)

TOPK = ed.TopK(k=4, values=16, temperatures=())

def config(*members, **fields):
    # Not "auto": two captures shall be the same, and which precision is faster is no matter of theirs.
    return ed.CacheConfig(members=members, unit_rows=200, batch_size=100, **{"precision": "fp32"} | fields)
"""
CLIENT = """
class Client:
    def __init__(self, url):
        self.url = url

    def __call__(self, image):
        body = json.dumps(image.flatten(1).tolist()).encode()
        with urllib.request.urlopen(self.url, body, timeout=60) as reply:
            said = json.load(reply)
        return ed.TopKLogProbs(np.array(said["ids"]), np.array(said["logprobs"]))

def cache():
    api = ed.Member(name="api", build=lambda: Client("URL"), version="toy 1")
    return config(net(), api, codec=TOPK)
"""


def pipeline(cli: Cli, text: str) -> None:
    (cli.folder / "served.py").write_text(HEADER + text)


def function(body: str, more: str = "", fields: str = "codec=TOPK") -> str:
    """A pipeline whose member ``api`` is a function with this body, beside a module."""
    more = more or "version='1'"
    return (
        f"def api(image):\n    {body}\n\ndef cache():\n"
        f'    return config(net(), ed.Member(name="api", build=lambda: api, {more}), {fields})\n'
    )


@contextmanager
def server(reply: Callable[[int, np.ndarray], tuple[int, object]]) -> Iterator[str]:
    """An HTTP server on loopback; ``reply`` gets the number of the request and its rows, and gives status and JSON."""
    count = iter(range(1 << 30))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            rows = np.array(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, said = reply(next(count), rows)
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/"
        finally:
            http.shutdown()
            thread.join()


def answer(rows: np.ndarray) -> dict[str, object]:
    z = rows @ np.cos(np.arange(640)).reshape(64, 10) / 16
    p = z - np.log(np.exp(z).sum(1, keepdims=True))
    ids = np.argsort(-p, axis=1, kind="stable")[:, :4]
    return {"ids": ids.tolist(), "logprobs": np.take_along_axis(p, ids, axis=1).tolist()}


def test_a_served_model_that_fails_once_costs_nothing_but_the_same_command(cli: Cli) -> None:
    with server(lambda n, rows: (503, None) if n == 6 else (200, answer(rows))) as url:
        pipeline(cli, CLIENT.replace("URL", url))
        error = cli(*CACHE, code=2).stderr
        assert error.startswith("error: served.py:") and "HTTPError: HTTP Error 503" in error, error
        assert "run the same command again" in error
        before = {p: p.read_bytes() for p in (cli.folder / "cache" / "commits").iterdir()}
        assert len(before) >= 1
        text = cli(*CACHE).stdout
        assert all(p.read_bytes() == held for p, held in before.items())
    assert "api: exact are the kept classes" in text
    plan = json.loads(cli("inspect", "cache", "--json").stdout)["plan"]
    assert plan["capture"]["tail"] == "unknown"
    api = plan["capture"]["members"][1]
    assert (api["version"], api["weights"], api["structure"], api["gives"]) == ("toy 1", None, None, "topk")
    shown = cli("inspect", "cache").stdout
    assert "toy 1" in shown and "api: exact are the kept classes" in shown and "NaN" in shown
    # The same function in the process says the same, and so does the float64 oracle.
    pipeline(cli, function("return ed.TopKLogProbs(*likeliest(image))"))
    cli("cache", "served.py", "--out", "local")
    digests = [json.loads(cli("inspect", name, "--json").stdout)["content_digest"] for name in ("cache", "local")]
    assert digests[0] == digests[1]
    check_mixture(cli.folder)
    assert "all as they were" in cli("verify", "cache", "--deep").stdout
    cli(
        "train",
        "served.py",
        "--cache",
        "cache",
        "--out",
        "run",
        "--set",
        SOFT,
        "--set",
        "epochs=1",
    )


SOFT = 'objective={"soft": {"kind": "soft_targets"}}'


def check_mixture(folder: Path) -> None:
    """The cache's rows of ``test`` against both members' whole distributions, mixed in float64."""
    held = ed.open_cache(folder / "cache")
    targets = held.targets_at(np.arange(100), split="test")
    from conftest import load_module

    digits = load_module(folder / "digits.py")
    images = torch.from_numpy(digits.arrays()[0][1200:1300])
    net = load_member(ed.Member(name="n", build=lambda: digits.Net(48), weights=folder / "a.safetensors")).module
    z = images.flatten(1).double() @ torch.arange(640).double().cos().reshape(64, 10) / 16
    p = (torch.softmax(net(images).double(), 1) + torch.softmax(z, 1)) / 2
    torch.testing.assert_close(targets.logprobs.double().exp(), p.gather(1, targets.ids), atol=1e-5, rtol=3e-3)
    torch.testing.assert_close(targets.residual.double(), 1 - p.gather(1, targets.ids).sum(1), atol=1e-5, rtol=5e-3)
    assert targets.entropy.isnan().all()


def test_a_uniform_tail_is_recorded_and_reported(cli: Cli) -> None:
    said = "return ed.TopKLogProbs(*likeliest(image))"
    pipeline(cli, function(said, fields="codec=ed.Dense()"))
    error = cli(*CACHE, code=2).stderr
    assert "'api' gives its likeliest classes only, but the codec dense needs" in error and "uniform" in error
    assert not (cli.folder / "cache" / "PLAN").exists()
    assert "taken as even" in cli(*CACHE, "--set", "tail=uniform").stdout
    assert "taken as even" in cli("inspect", "cache").stdout
    plan = json.loads(cli("inspect", "cache", "--json").stdout)["plan"]
    assert plan["capture"]["tail"] == "uniform"
    pipeline(cli, function(said, more="version='2'", fields="codec=ed.Dense()"))
    error = cli(*CACHE, "--set", "tail=uniform", code=3).stderr  # another version is another member
    assert "capture.members[1].version" in error


KEPT = "codec=TOPK"


@pytest.mark.parametrize(
    ("body", "more", "fields", "code", "words"),
    [
        ("return 3", "", "", 2, "'api' gave int, expected logits [batch, 10]"),
        ("return logprobs(image)", "weights=None", "", 2, "'api': build() gave a function, and no hash"),
        ("", "version='1', weights=HERE / 'a.safetensors'", "", 2, "weights are loaded into an nn.Module"),
        ("", "version='1'", "taps=(ed.Tap(member='api', module='pool'),)", 2, "'api' is no nn.Module but a function"),
        ("", "version='['", "", 2, "version"),
        ("raise ValueError('no route')", "", "", 2, "served.py:"),
        ("return ed.LogProbs(logprobs(image) + (len(image) > 2) * 0.01)", "", "", 7, "'api' gave log-probabilities"),
        ("return torch.full((len(image), 10), float('nan') if len(image) > 2 else 0)", "", "", 7, "NaN"),
        ("i, p = likeliest(image); return ed.TopKLogProbs(i * (1 if len(i) == 2 else 5), p)", "", KEPT, 7, "class "),
        ("i, p = likeliest(image); return ed.TopKLogProbs(i, p + (len(i) > 2) * 2)", "", KEPT, 7, "expected 1 at most"),
        ("i, p = likeliest(image); return ed.TopKLogProbs(i, p + 2)", "", KEPT, 7, "expected 1 at most"),
        ("i, p = likeliest(image, 3); return ed.TopKLogProbs(i, p)", "", KEPT, 7, "only 3 known classes"),
    ],
)  # fmt: skip
def test_members_that_are_none_or_say_nonsense(
    cli: Cli, body: str, more: str, fields: str, code: int, words: str
) -> None:
    pipeline(cli, function(body or "return logprobs(image)", more, fields or "codec=ed.Dense()"))
    error = cli(*CACHE, code=code).stderr
    assert error.startswith("error: ") and words in error, error
    assert not (cli.folder / "cache" / "commits").exists()
    if code == 7:
        assert "'api'" in error and "for sample 0 of " in error and "committed" in error


# Members one after another -----------------------------------------------------------------------------


class Counted(nn.Module):
    """Writes down when it is moved and when it runs."""

    log: list[tuple[str, str]] = []

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.name, self.body = name, nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        self.head = nn.Linear(4 * 36, 3)

    def to(self, *args: object, **kwargs: object) -> Counted:
        Counted.log.append((self.name, "moved"))
        return super().to(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        Counted.log.append((self.name, "ran"))
        return self.head(self.body(x))


def both(device: torch.device, build: Callable[[str, int], nn.Module], **fields: object) -> Ensemble:
    config = ed.CacheConfig(
        members=tuple(ed.Member(name=n, build=lambda n=n, i=i: build(n, i)) for i, n in enumerate("ab")), **fields
    )
    return Ensemble([load_member(m) for m in config.members], config, 3, [device])


def test_members_in_turn_say_the_same_to_the_bit() -> None:
    x, taps = {"x": torch.randn(5, 1, 8, 8)}, (ed.Tap(member="b", module="body"),)
    together = both(CPU, Counted, taps=taps)(x)
    one = both(CPU, Counted, taps=taps, one_at_a_time=True)
    Counted.log.clear()
    in_turn = one(x)
    assert Counted.log == [(n, what) for n in "ab" for what in ("moved", "ran", "moved")]
    assert torch.equal(in_turn.logprobs, together.logprobs)
    assert all(torch.equal(a, b) for a, b in zip(in_turn.members, together.members, strict=True))
    assert torch.equal(in_turn.features["tap/b.body"], together.features["tap/b.body"])
    assert torch.equal(one(x).logprobs, together.logprobs)  # and again, after they came back


def test_a_capture_in_turn_has_the_same_content_and_plan(captured: Path, cli: Cli) -> None:
    cli("cache", "digits.py", "--out", "cache", "--set", "one_at_a_time=true")
    reports = [json.loads(cli("inspect", name, "--json").stdout) for name in ("cache", captured / "cache")]
    assert reports[0]["content_digest"] == reports[1]["content_digest"] and reports[0]["plan"] == reports[1]["plan"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_members_in_turn_need_the_memory_of_one() -> None:
    def build(name: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 1 << 20, bias=False), nn.Linear(1 << 20, 3))  # 268 MB

    device, x, peaks, said = torch.device("cuda"), {"x": torch.randn(5, 1, 8, 8)}, [], []
    for in_turn in (False, True):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        one = both(device, build, one_at_a_time=in_turn)
        torch.cuda.reset_peak_memory_stats()
        said.append(one(x).logprobs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if in_turn:
            assert torch.cuda.memory_allocated() - before < 1 << 20
            assert all(p.is_pinned() for module in one.modules for p in module.parameters())
        del one
    assert torch.equal(*said) and peaks[1] < 0.6 * peaks[0]


def test_probabilities_are_not_taken_for_logits() -> None:
    look = {"x": torch.randn(5, 3)}
    weights = torch.randn(3, 4)
    for temperature in (1.0, 3.0):
        with pytest.raises(UsageError, match="which are probabilities; expected logits"):
            member = ensemble({"a": lambda x: (x @ weights).softmax(1)}, 4)
            member.temper([temperature], 1.0)
            member.look(look)
    for said in (
        lambda x: x @ weights,
        lambda x: (x @ weights).sigmoid(),
        lambda x: ed.LogProbs((x @ weights).log_softmax(1)),
    ):
        ensemble({"a": said}, 4).look(look)
