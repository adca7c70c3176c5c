"""The four floors: a package imports only from floors below it, and the allocator stays light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"


def test_every_package_keeps_its_floor(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(PYPROJECT), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_the_contract_covers_every_package_in_the_order_of_the_floors() -> None:
    contract = tomllib.loads(PYPROJECT.read_text())["tool"]["importlinter"]
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert contract["contracts"][0]["layers"] == ["api", "profiler", "compressor", "allocator"]
    assert packages == set(contract["root_packages"]) == {"api", "profiler", "compressor", "allocator"}


def test_importing_the_allocator_loads_no_tensor_library() -> None:
    modules = sorted(f"allocator.{p.stem}" for p in (ROOT / "allocator").glob("*.py") if p.stem != "__init__")
    script = f"""
import importlib, sys
for name in {modules}:
    importlib.import_module(name)
sys.exit(" ".join({{"torch", "transformers", "fastapi", "typer"}} & set(sys.modules)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
