# SPDX-License-Identifier: Apache-2.0
"""Detectors: a classifier of the user's own, in the form the native module expects.

A detector is an object with a method `score`, or a callable with the same signature:

    score(images, names) -> [n, len(names)]

images is a float32 tensor [n, height, width, 3] in 0..1, on the CPU; names is a list of phrases.
The answer (tensor, array or nested lists) says in 0..1 how surely each picture shows each name,
with NaN or None for a name that the detector does not know. `name` and `version` are optional
attributes that go into the report. It may raise: that is reported for the pictures at hand.

In ComfyUI any node with an output of type LACUNA_DETECTOR can hand such an object to Evaluate
Erasure; the command line takes `lacuna evaluate --detector FILE.py:name`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from .errors import HostError, brief

log = logging.getLogger(__name__)


class SafeDetector:
    """Turns what a detector raises into a sentence, so that a long evaluation goes on."""

    def __init__(self, detector: Any, passing: tuple[type[BaseException], ...] = ()) -> None:
        """passing: exceptions that are not the detector's, such as the host's interrupt."""
        self._score = getattr(detector, "score", detector)
        if isinstance(detector, type) or not callable(self._score):
            raise HostError(
                f"What is connected as detector ({_type_name(detector)}) is none: it needs a "
                "method score(images, names) that returns a number in 0..1 for each picture and "
                "name."
            )
        self._passing = passing
        self.name = str(getattr(detector, "name", None) or _type_name(detector))
        self.version = str(getattr(detector, "version", None) or "unknown")

    def score(self, images: torch.Tensor, names: list[str]) -> torch.Tensor | str:
        """Scores [n, names], or what went wrong."""
        try:
            scores = _as_tensor(self._score(images, names))
        except self._passing:
            raise
        except Exception as error:
            log.debug("The detector failed", exc_info=True)
            return f"{type(error).__name__}: {error}"
        expected = [len(images), len(names)]
        if list(scores.shape) != expected:
            return f"it returned scores of shape {list(scores.shape)}, not {expected}"
        return scores


def load_detector(place: str) -> SafeDetector:
    """From "FILE.py:name" or "module:name"; a class is called without arguments."""
    source, colon, name = place.rpartition(":")
    if not colon or not source or not name:
        raise HostError(
            f'"{place}" names no detector; write FILE.py:name or module:name, for example '
            "--detector judge.py:Judge."
        )
    try:
        path = Path(source)
        module = _from_file(path) if path.suffix == ".py" else importlib.import_module(source)
        detector = getattr(module, name, None)
        if detector is None:
            raise HostError(f"{source} has nothing called {name}.")
        return SafeDetector(detector() if isinstance(detector, type) else detector)
    except HostError:
        raise
    except (Exception, SystemExit) as error:  # a script may end the process
        raise HostError(
            f"The detector {place} cannot be loaded: {brief(error) or type(error).__name__}"
        ) from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise HostError(f"There is no detector file {path}.")
    spec = importlib.util.spec_from_file_location(f"lacuna_detector_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for what looks its own module up, such as dataclasses
    sys.path.insert(0, str(path.resolve().parent))  # as for a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _type_name(detector: Any) -> str:
    return getattr(detector, "__name__", None) or type(detector).__name__


def _as_tensor(scores: Any) -> torch.Tensor:
    if isinstance(scores, list | tuple) and not any(torch.is_tensor(row) for row in scores):
        scores = [
            [float("nan") if value is None else float(value) for value in row] for row in scores
        ]
    elif isinstance(scores, list | tuple):
        scores = torch.stack([torch.as_tensor(row) for row in scores])
    return torch.as_tensor(scores).detach().to("cpu", torch.float64)
