"""Which models a request may name: the embedded demo, names under the model roots, hub ids.

What lives here: turning such a name into what `profile_model` takes, and refusing every other. A name never reaches a
file outside the roots, through `..` or a symlink. Loading is the profiler's.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from api.problems import ProblemError
from api.schemas.documents import MODEL_PATTERN
from api.settings import Settings

DEMO = "demo"


class Catalogue:
    """The models of one installation."""

    def __init__(self, settings: Settings) -> None:
        self._roots = tuple(root.resolve() for root in settings.model_roots)
        self._hub = settings.hub

    def resolve(self, model: str) -> str:
        """The directory of a local model, or the hub id as it is. Raises `ProblemError` for any other name."""
        if re.fullmatch(MODEL_PATTERN, model) is None or ".." in model:
            raise ProblemError(
                "unknown-model", "this is no model name; give 'demo', a name under a model root or a hub id"
            )
        if model == DEMO:
            return DEMO
        for root in self._roots:
            if (root / model).is_dir():
                return str(_confined(root / model, root, model))
        if not self._hub or "/" not in model or Path(model).exists():
            raise ProblemError(
                "unknown-model",
                f"no model {model!r} under BITRANK_MODEL_ROOTS; give 'demo', a name there"
                + (" or a hub id like owner/name" if self._hub else ""),
            )
        return model

    def names(self) -> list[str]:
        """The demo and every directory with a config.json, one or two levels below a root."""
        found = {DEMO}
        for root in self._roots:
            for config in (*root.glob("*/config.json"), *root.glob("*/*/config.json")):
                name = config.parent.relative_to(root).as_posix()
                if re.fullmatch(MODEL_PATTERN, name):
                    found.add(name)
        return sorted(found)


def _confined(folder: Path, root: Path, model: str) -> Path:
    """`folder` resolved; raises unless it and every file in it lie under `root`, symlinks followed."""
    resolved = folder.resolve()
    for path in (
        resolved,
        *(Path(top) / f for top, dirs, files in os.walk(resolved) for f in (*dirs, *files)),
    ):
        if not path.resolve().is_relative_to(root):
            raise ProblemError(
                "unknown-model", f"{model!r} leads outside its model root; copy the model into it"
            )
    return resolved
