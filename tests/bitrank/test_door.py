"""`import bitrank`: light, its own, and enough for transformers to load a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bitrank


def run(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )


def test_importing_it_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "pydantic", "fastapi", "httpx"}
    finished = run(f"import bitrank, sys; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)", tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_every_name_is_there() -> None:
    for name in bitrank.__all__:
        assert getattr(bitrank, name) is not None
    assert set(dir(bitrank)) == set(bitrank.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bitrank.nothing


ORDERS = {
    "bitrank first": "import bitrank; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import bitrank",
    "transformers used first": (
        "from transformers import AutoModelForCausalLM, LlamaForCausalLM; import bitrank"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_loads_a_checkpoint(order: str, small: Path) -> None:
    loading = f"model = AutoModelForCausalLM.from_pretrained({str(small)!r})"
    script = f"{ORDERS[order]}\n{loading}\nprint(type(model).__name__)"
    finished = run(script, small.parent)
    assert finished.stdout.strip() == "LlamaForCausalLM", finished.stderr


def test_the_road_in_python(made: bitrank.Profile, small: Path) -> None:
    plan = made.plan("3.25bpw")
    assert plan.lower_bound <= plan.predicted_kl
    assert made.plan(strategy="uniform:3").total_bytes > 0
    assert len(made.frontier()) > 1
    assert bitrank.load(made.path).path == made.path
    found = bitrank.evaluate(small, reference=made.measured.document.model.id, tokens=512)
    assert found.kl_nats > 0


def test_errors_are_of_one_kind(tmp_path: Path, made: bitrank.Profile) -> None:
    with pytest.raises(bitrank.Error, match="nothing"):
        bitrank.load(tmp_path / "nothing")
    with pytest.raises(bitrank.Error, match="bpw"):
        made.plan("much")
    with pytest.raises(bitrank.Error, match="already exists"):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("")
        bitrank.compress(made.plan("3.25bpw"), tmp_path / "full")


@pytest.mark.parametrize("name", ["api", "profiler", "compressor", "allocator"])
def test_a_folder_of_the_same_name_is_noticed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text("import bitrank\n")
    finished = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    (said,) = [line for line in finished.stderr.splitlines() if line.startswith("ImportError")]
    assert f"a package called {name}" in said
    assert "rename yours" in said
