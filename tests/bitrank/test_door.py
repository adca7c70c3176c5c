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


WRONG = {
    "bits": [(99,), (), (2.5,), "3"],
    "ranks": [(-1,), "0"],
    "group_sizes": [(63,), 64],
    "tokens": ["many"],
    "seed": ["x"],
    "calibration": [5],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_a_wrong_setting_is_refused_before_anything_is_measured(
    name: str, value: object, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(bitrank.Error, match=f"the setting {name} cannot be"):
        bitrank.profile(str(tiny_model), tmp_path / "profile", **{name: value})
    assert not (tmp_path / "profile").exists()


def test_slips_are_told_in_a_sentence(made: bitrank.Profile, small: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="there is no setting 'token'; choose from"):
        bitrank.profile("demo", tmp_path / "profile", token=5)
    with pytest.raises(TypeError, match="a budget is a text such as '3.25bpw'"):
        made.plan(3.25)
    with pytest.raises(bitrank.Error, match="tokens cannot be 0"):
        bitrank.evaluate(small, reference="demo", tokens=0)
    assert len(repr(made)) < 300


def test_a_plan_is_saved_and_carried_out_from_its_file(made: bitrank.Profile, tmp_path: Path) -> None:
    bitrank.load(made.path).plan("3.25bpw").save(str(tmp_path / "plan.json"))
    bitrank.compress(str(tmp_path / "plan.json"), tmp_path / "small")
    assert (tmp_path / "small" / "config.json").exists()


def test_asking_where_a_module_is_does_not_use_the_hook_up(small: Path) -> None:
    script = f"""
import bitrank, importlib.util
importlib.util.find_spec("transformers.modeling_utils")
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained({str(small)!r})).__name__)
"""
    finished = run(script, small.parent)
    assert finished.stdout.strip() == "LlamaForCausalLM", finished.stderr


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
