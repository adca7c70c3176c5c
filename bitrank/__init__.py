"""Decide how many bits and how much rank every weight matrix of a language model deserves.

    import bitrank

    profile = bitrank.profile("model", "profile", device="cuda")
    plan = profile.plan("3.25bpw")
    bitrank.compress(plan, "small")
    print(bitrank.evaluate("small", reference="model").kl_nats)

What lives here: the names of the Python interface. Importing this takes milliseconds and no torch; what a function
needs is imported when it is called. Once transformers is there, it loads checkpoints that bitrank wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitrank._own import check_own_packages
from bitrank._transformers import register_plugin

if TYPE_CHECKING:
    from allocator.errors import BitrankError as Error
    from allocator.plan import Plan
    from api.client import Client
    from bitrank.functions import Profile, compress, evaluate, load, profile

    __version__: str

__all__ = ["Client", "Error", "Plan", "Profile", "__version__", "compress", "evaluate", "load", "profile"]

_HOMES = {
    "Client": ("api.client", "Client"),
    "Error": ("allocator.errors", "BitrankError"),
    "Plan": ("allocator.plan", "Plan"),
    "Profile": ("bitrank.functions", "Profile"),
    "compress": ("bitrank.functions", "compress"),
    "evaluate": ("bitrank.functions", "evaluate"),
    "load": ("bitrank.functions", "load"),
    "profile": ("bitrank.functions", "profile"),
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for (PEP 562)."""
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("bitrank")
    if name not in _HOMES:
        raise AttributeError(f"module 'bitrank' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)


check_own_packages()
register_plugin()
