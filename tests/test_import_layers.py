"""The layers: packages and folders import only from those below them, folders stay small, the allocator stays light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
LAYERS = ["bitrank", "api", "profiler", "compressor", "allocator"]
MOST_FILES = 12
PYPROJECT = ROOT / "pyproject.toml"


def test_imports_go_down(capsys: pytest.CaptureFixture[str]) -> None:
    status = lint_imports(config_filename=str(PYPROJECT), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_the_contract_covers_every_package_in_the_order_of_the_layers() -> None:
    tool = tomllib.loads(PYPROJECT.read_text())["tool"]
    shipped = {pattern.rstrip("*") for pattern in tool["setuptools"]["packages"]["find"]["include"]}
    assert tool["importlinter"]["contracts"][0]["layers"] == LAYERS
    assert shipped == set(tool["importlinter"]["root_packages"]) == set(LAYERS)


def test_importing_the_allocator_loads_no_tensor_library() -> None:
    files = (ROOT / "allocator").rglob("*.py")
    modules = sorted(
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files
    )
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


@pytest.mark.parametrize("package", LAYERS)
def test_a_folder_has_a_dozen_files_at_most(package: str) -> None:
    for folder in [ROOT / package, *(ROOT / package).rglob("*/")]:
        files = [file.name for file in folder.glob("*.py") if file.stem != "__init__"]
        assert len(files) <= MOST_FILES, (folder, sorted(files))
