"""The four floors: a package imports only from floors below it, and the allocator stays light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
FLOORS = ["api", "profiler", "compressor", "allocator"]
PYPROJECT = ROOT / "pyproject.toml"


def test_every_package_keeps_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(PYPROJECT), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_the_contract_covers_every_package_in_the_order_of_the_floors() -> None:
    tool = tomllib.loads(PYPROJECT.read_text())["tool"]
    shipped = {pattern.rstrip("*") for pattern in tool["setuptools"]["packages"]["find"]["include"]}
    assert tool["importlinter"]["contracts"][0]["layers"] == FLOORS
    assert shipped == set(tool["importlinter"]["root_packages"]) == set(FLOORS)


def test_importing_the_allocator_loads_no_tensor_library() -> None:
    modules = sorted(f"allocator.{p.stem}" for p in (ROOT / "allocator").glob("*.py") if p.stem != "__init__")
    script = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
sys.exit(" ".join({{"torch", "transformers", "fastapi", "typer"}} & set(sys.modules)) or 0)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
