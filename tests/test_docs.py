"""What the documents say is what the code does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cli, environment
from pydantic import BaseModel

import ensemble_distill as ed
from ensemble_distill.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]

TINY = """
import sys
sys.path.insert(0, {pipelines!r})
from fashion_mnist import data
import torch, ensemble_distill as ed

def cache():
    build = lambda: torch.nn.Sequential(Float(), torch.nn.Flatten(), torch.nn.Linear(784, 10))
    torch.manual_seed(0)
    return ed.CacheConfig(members=(ed.Member(name="a", build=build),), precision="fp32")

class Float(torch.nn.Module):
    def forward(self, x):
        return x.float() / 255
"""


def test_the_example_of_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    """On a cache of all of Fashion-MNIST, made by a teacher that is small enough for a test."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "tiny.py").write_text(TINY.format(pipelines=str(ROOT / "pipelines")))
    Cli(tmp_path)("cache", "tiny.py", "--out", "runs/quickstart/cache")
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = example[1] + "\nassert float(loss) < 3, loss\n"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("data/**/*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", ["DataConfig", "CacheConfig", "TrainConfig"])
def test_every_field_of_a_configuration_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "pipelines.md").read_text()
    config: type[BaseModel] = getattr(ed, name)
    section = text.split(f"## {name}")[1].split("\n## ")[0]
    for field in config.model_fields:
        assert f"`{field}`" in section, f"docs/pipelines.md says nothing of {name}.{field}"


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert command in text


def test_no_document_names_a_file_of_the_source_that_is_gone() -> None:
    text = (ROOT / "docs" / "design.md").read_text()
    package = ROOT / "ensemble_distill"
    for name in re.findall(r"\b([a-z0-9_/]+\.py)\b", text):
        assert (package / name).exists(), name


def test_the_committed_data_is_what_its_readme_says() -> None:
    import hashlib

    text = (ROOT / "data" / "README.md").read_text()
    hashes = dict(re.findall(r"\| `([^`]+\.gz)` \| `([0-9a-f]{64})` \|", text))
    assert len(hashes) == 4
    for name, digest in hashes.items():
        assert hashlib.sha256((ROOT / "data" / "fashion_mnist" / name).read_bytes()).hexdigest() == digest


def test_fashion_mnist_is_split_as_documented(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "pipelines", tmp_path / "pipelines")
    (tmp_path / "data").symlink_to(ROOT / "data")
    code = (
        "from fashion_mnist import data\n"
        "sizes = {name: len(source) for name, source in data().sources.items()}\n"
        "assert sizes == {'train': 55000, 'held_out': 5000, 'test': 10000}, sizes\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "pipelines", env=environment(), check=True)
