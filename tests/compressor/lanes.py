"""CUDA kernels built for this machine: their source behind `lanes.h`, which plays a card's lanes by coroutines."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

HEADER = Path(__file__).parent / "lanes.h"
SHARED_BYTES = 256 * 1024


def built(source: str, name: str, types: Sequence[str], folder: Path) -> Callable[..., None]:
    """The kernel `name` of so many arguments, then the width and height of the launch and the threads of a block."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    (folder / f"{name}.cpp").write_text(_driver(source, name, types))
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"{name}.cpp", "-o", f"{name}.so"]
    subprocess.run(command, cwd=folder, check=True)
    run: Callable[..., None] = ctypes.CDLL(str(folder / f"{name}.so")).run
    return run


def _driver(source: str, name: str, types: Sequence[str]) -> str:
    kernel = re.sub(
        r"extern __shared__ (\w+) shared\[\];", rf"static \1 shared[{SHARED_BYTES // 4}];", source
    )
    kernel = kernel.replace('extern "C" __global__', "static")
    declared = "".join(f"static {type_} a{i};\n" for i, type_ in enumerate(types))
    given = ", ".join(f"{type_} b{i}" for i, type_ in enumerate(types))
    kept = " ".join(f"a{i} = b{i};" for i in range(len(types)))
    passed = ", ".join(f"a{i}" for i in range(len(types)))
    return (
        f'#include "{HEADER}"\n{kernel}\n{declared}extern "C" void run({given}, int wide, int high, int threads)'
        f" {{ {kept} launch([] {{ {name}({passed}); }}, wide, high, threads); }}\n"
    )
