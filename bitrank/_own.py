"""Whether the packages that bitrank consists of are its own.

They are called allocator, api, compressor and profiler, and a folder of the user's may have such a name: Python takes
what lies beside the script first.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("allocator", "api", "compressor", "profiler")


def check_own_packages() -> None:
    """Raise `ImportError` where another module hides one of bitrank's own."""
    here = Path(__file__).parents[1]
    for name in PACKAGES:
        if name in sys.modules and getattr(sys.modules[name], "__spec__", None) is None:
            raise ImportError(f"a module called {name} is not bitrank's own, and hides it; rename it")
        spec = find_spec(name)
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])]
        if not any(place and Path(place).is_relative_to(here / name) for place in places):
            found = next((place for place in places if place), "nowhere")
            raise ImportError(
                f"bitrank has a package called {name}, and Python finds another one ({found}); rename yours, or run"
                " Python from another directory"
            )
