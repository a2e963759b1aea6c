"""Load a pipeline: the Python file named on the command line, and nothing else of the user's."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ensemble_distill.config import CacheConfig, DataConfig, TrainConfig, override
from ensemble_distill.errors import Error, UsageError
from ensemble_distill.explain import explain, suggestion
from ensemble_distill.frozen import Config
from ensemble_distill.sources.arrays import Limited, Source

C = TypeVar("C", bound=Config)


class Pipeline:
    """A pipeline file; its functions are called when their stage needs them, and never before."""

    def __init__(self, spec: str) -> None:
        path, _, self.variant = spec.partition(":")
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{path}: no such file", hint="give a pipeline, such as pipelines/fashion_mnist.py")
        self.module = self._import()

    def data(self) -> DataConfig:
        return self._call("data", DataConfig)

    def cache(self) -> CacheConfig:
        return self._call("cache", CacheConfig)

    def train(self) -> TrainConfig:
        return self._call(self.variant or "train", TrainConfig)

    def _import(self) -> ModuleType:
        # As `python FILE` does: the file's own folder comes first, so that it can import its parts.
        sys.path.insert(0, str(self.path.parent.absolute()))
        spec = importlib.util.spec_from_file_location("pipeline", self.path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["pipeline"] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise failed(error) from error
        return module

    def _call(self, name: str, kind: type[C]) -> C:
        function = getattr(self.module, name, None)
        if not callable(function):
            there = [n for n, v in vars(self.module).items() if callable(v) and not isinstance(v, type)]
            raise UsageError(f"{self.path} has no function {name!r}{suggestion(name, there)}")
        try:
            result = function()
        except (Exception, SystemExit) as error:
            raise failed(error) from error
        if not isinstance(result, kind):
            raise UsageError(f"{self.path}: {name}() gave a {type(result).__name__}, expected a {kind.__name__}")
        try:
            return kind(**vars(result))  # model_copy(update=...) checks nothing
        except ValidationError as error:
            raise UsageError(f"{self.path}: {name}(): {explain(error, kind)}") from error


def sources(data: DataConfig, limit: int | None) -> Mapping[str, Source]:
    """The pipeline's sources by split, cut to the first ``limit`` samples."""
    if limit is None:
        return data.sources
    return {name: Limited(source, limit) for name, source in data.sources.items()}


def overridden(config: C, settings: Iterable[str], **options: object) -> C:
    """The configuration with the options that were given, and with what --set says over them."""
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return override(override(config, given), settings)


def failed(error: BaseException) -> Error:
    """An exception that came out of the pipeline's code, as one sentence with file and line."""
    if isinstance(error, Error):
        return error
    where = user_line(error) or "the pipeline"
    if isinstance(error, ValidationError):
        return UsageError(f"{where}: {explain(error, _model(error.title))}")
    if isinstance(error, ImportError):
        return UsageError(f"{where}: {error}", hint="install what the pipeline imports")
    return UsageError(
        f"{where}: {type(error).__name__}: {error}",
        hint="mend the pipeline, or run the same command again if it was a server's fault: what is committed or saved "
        "stays; --debug shows the traceback",
    )


def user_line(error: BaseException) -> str | None:
    """``file:line`` of the last place in the pipeline's folder that an error passed, or None."""
    if (module := sys.modules.get("pipeline")) is None or module.__file__ is None:
        return None
    folder = Path(module.__file__).absolute().parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if Path(f.filename).absolute().is_relative_to(folder) and "/site-packages/" not in f.filename
    ]
    return f"{os.path.relpath(own[-1].filename)}:{own[-1].lineno}" if own else None


def _model(title: str) -> type[BaseModel]:
    kinds: list[type[BaseModel]] = list(Config.__subclasses__())
    return next((kind for kind in kinds if kind.__name__ == title), Config)
