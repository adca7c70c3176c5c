"""Several calibration texts: each as often as the others, wherever a calibration text is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import CommandLine
from road import Road

from profiler.documents.profile import load_profile
from profiler.model.checkpoint import DEMO_PATH, find_model
from profiler.model.layers import open_model
from profiler.statistics.calibration import text_tokens

GRID = ("--bits", "2,3,4", "--ranks", "0", "--group-sizes", "64", "--tokens", "1024")
EACH = 512
"""Tokens of each of two texts, eight windows."""


@pytest.fixture
def other(bitrank: CommandLine) -> Path:
    """Text that is not the road's."""
    file = bitrank.folder / "other.txt"
    file.write_text((DEMO_PATH / "evaluation.txt").read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    return file


def windows(folder: Path) -> list[tuple[int, ...]]:
    profile = load_profile(folder)
    return [
        tuple(row) for part in (profile.calibration_tokens(), profile.probe_tokens()) for row in part.tolist()
    ]


def test_a_profile_mixes_its_texts_evenly(bitrank: CommandLine, road: Road, other: Path) -> None:
    texts = ("--calibration", road.text, "--calibration", other)
    outcome = bitrank("profile", road.model, "-o", "out", *texts, *GRID)
    assert outcome.code == 0, outcome.stderr
    loaded, found = open_model(find_model(str(road.model))), windows(bitrank.folder / "out")
    of_each = [
        {tuple(row) for row in text_tokens(loaded, text, EACH).tolist()} for text in (road.text, other)
    ]
    assert [sum(window in share for window in found) for share in of_each] == [8, 8]
    assert len(found) == 16
    source = json.loads((bitrank.folder / "out" / "profile.json").read_text())["calibration"]["source"]
    assert source == "calibration.txt + other.txt"
    assert bitrank("plan", "out", "--budget", "3bpw").code == 0


def test_one_of_two_texts_is_another_profile(bitrank: CommandLine, road: Road, other: Path) -> None:
    texts = ("--calibration", road.text, "--calibration", other)
    assert bitrank("profile", road.model, "-o", "out", *texts, *GRID).code == 0
    outcome = bitrank("profile", road.model, "-o", "out", *texts[:2], *GRID)
    assert outcome.code == 1
    assert "out already holds another profile" in outcome.complaint
    assert bitrank("profile", road.model, "-o", "out", *texts, *GRID).code == 0


def test_fidelity_is_calibrated_on_several_texts(bitrank: CommandLine, road: Road, other: Path) -> None:
    texts = ("--calibration", road.text, "--calibration", other)
    outcome = bitrank("fidelity", road.model, *texts, "--tokens", "1024", "--json")
    assert outcome.code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert found["calibration"] == "calibration.txt + other.txt"
    assert found["text"] == "calibration.txt + other.txt, held back"


def test_caches_are_calibrated_on_several_texts(bitrank: CommandLine, road: Road, other: Path) -> None:
    """Another mixture of texts gives other bases, and so another loss."""
    losses = []
    for texts in (("--calibration", road.text), ("--calibration", road.text, "--calibration", other)):
        rest = ("--text", road.text, "--tokens", "1024", "--ratio", "0.5", "--json")
        outcome = bitrank("kvcache", road.model, "uniform", *texts, *rest)
        assert outcome.code == 0, outcome.stderr
        losses.append(json.loads(outcome.stdout)["caches"][0]["kl_nats"])
    assert losses[0] != losses[1] and min(losses) > 0


@pytest.mark.parametrize("command", ["profile", "fidelity", "kvcache"])
def test_one_text_of_several_that_is_missing_is_named(bitrank: CommandLine, road: Road, command: str) -> None:
    texts = ("--calibration", road.text, "--calibration", "nowhere.txt")
    outcome = bitrank(command, road.model, "-o", "out", *texts)
    assert outcome.code == 1
    assert "cannot read nowhere.txt" in outcome.complaint
    assert not (bitrank.folder / "out").exists()


def test_one_text_of_several_that_is_empty_is_named(bitrank: CommandLine, road: Road) -> None:
    (bitrank.folder / "empty.txt").touch()
    texts = ("--calibration", road.text, "--calibration", "empty.txt")
    outcome = bitrank("profile", road.model, "-o", "out", *texts)
    assert outcome.code == 1
    assert "empty.txt is empty" in outcome.complaint
