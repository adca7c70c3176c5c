"""Registering the transformers plug-in, whether transformers is imported before bitrank or after.

The plug-in (`compressor.plugin`) needs torch and transformers, which take seconds. So where transformers has not been
imported, a finder waits until it loads models, and imports the plug-in right after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LOADS_MODELS = "transformers.modeling_utils"


def register_plugin() -> None:
    """Register the plug-in now, or when transformers is ready to load models."""
    if LOADS_MODELS in sys.modules:
        import compressor.plugin  # noqa: F401
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds nothing by itself; has the plug-in imported after transformers' loading code."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LOADS_MODELS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as another loader does, then imports the plug-in."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        # Only now: who asks where a module is does not import it, and an import that failed is tried again.
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        import compressor.plugin  # noqa: F401

    def __getattr__(self, name: str) -> Any:
        """All else is as the inner loader has it, such as the source."""
        return getattr(self._inner, name)
