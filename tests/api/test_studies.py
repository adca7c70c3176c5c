"""`bitrank fidelity`, `spectrum` and `cliff`, and the page that each writes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from road import Road

from profiler.documents.profile import load_profile
from profiler.documents.sidecar import CliffDocument, FidelityDocument, SpectrumDocument

CUTS = ("--ratios", "0.75,0.5", "--tokens", "256")


def answer(bitrank: CommandLine, *arguments: str | Path) -> Any:
    outcome = bitrank(*arguments, "--json")
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def weights(road: Road) -> str:
    return load_profile(road.profile).document.model.weights_sha256


def test_fidelity_prints_what_it_writes(bitrank: CommandLine, road: Road) -> None:
    found = answer(
        bitrank, "fidelity", road.model, "-o", "f.json", "--calibration", road.text, "--tokens", "1024"
    )
    written = FidelityDocument.load(bitrank.folder / "f.json")
    assert found["content_sha256"] == written.digest
    assert written.model.weights_sha256 == weights(road)
    assert written.text == "calibration.txt, held back"
    assert "bitrank fidelity" in (bitrank.folder / "f.html").read_text(encoding="utf-8")


def test_fidelity_of_the_command_is_that_of_the_profile(bitrank: CommandLine, road: Road) -> None:
    """Same weights, calibration and windows: the same blocks, as far as arithmetic in another order allows."""
    found = answer(bitrank, "fidelity", road.model, "--calibration", road.text, "--tokens", "1024")
    beside = FidelityDocument.beside(road.profile, weights(road))
    assert beside is not None
    assert len(found["blocks"]) == len(beside.blocks)
    for here, there in zip(found["blocks"], beside.blocks, strict=True):
        assert here["probe_kl"]["mean"] == pytest.approx(there.probe_kl.mean, rel=0.02)
        assert here["block_influence"]["mean"] == pytest.approx(there.block_influence.mean)
        assert here["embedding_recovery"]["mean"] == there.embedding_recovery.mean


def test_fidelity_is_measured_on_a_given_text(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank(
        "fidelity", road.model, "--calibration", road.text, "--text", road.text, "--tokens", "1024"
    )
    assert outcome.code == 0, outcome.stderr
    for words in ("on calibration.txt (3 windows of 64 tokens; 90% intervals)", "tier", "too few blocks"):
        assert words in outcome.stdout


def test_a_spectrum_beside_a_profile_is_taken_for_its_own(
    bitrank: CommandLine, road: Road, tmp_path: Path
) -> None:
    copy = tmp_path / "profile"
    shutil.copytree(road.profile, copy)
    (copy / "spectrum.json").unlink()
    outcome = bitrank("spectrum", road.model, "-o", copy / "spectrum.json")
    assert outcome.code == 0, outcome.stderr
    assert "95.0% energy" in outcome.stdout
    assert "q_proj, a head" in outcome.stdout
    assert SpectrumDocument.beside(copy, weights(road)) == SpectrumDocument.beside(
        road.profile, weights(road)
    )


def test_a_cliff_names_where_energy_is_not_enough(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("cliff", road.model, "--text", road.text, *CUTS, "-o", "cliff.json")
    assert outcome.code == 0, outcome.stderr
    for words in ("rounding every matrix to 4 bits costs", "95 % energy at", "gate_proj", "q heads"):
        assert words in outcome.stdout
    found = CliffDocument.load(bitrank.folder / "cliff.json")
    assert [cut.ratio for cut in found.groups[0].cuts] == [1, 0.75, 0.5]
    assert (bitrank.folder / "cliff.html").exists()


# Bad input


@pytest.mark.parametrize("ratios", ["high", "1.5", "0", "0.5,nan"])
def test_ratios_that_are_none_are_wrong_usage(bitrank: CommandLine, road: Road, ratios: str) -> None:
    outcome = bitrank("cliff", road.model, "--ratios", ratios)
    assert outcome.code == 2
    assert "--ratios" in outcome.stderr


@pytest.mark.parametrize("command", ["fidelity", "cliff"])
def test_a_text_of_one_token_is_refused(
    bitrank: CommandLine, road: Road, tmp_path: Path, command: str
) -> None:
    (tmp_path / "short.txt").write_text("x")
    outcome = bitrank(command, road.model, "--text", tmp_path / "short.txt")
    assert outcome.code == 1
    assert "has 1 tokens" in outcome.complaint


@pytest.mark.parametrize("command", ["fidelity", "cliff"])
def test_a_text_that_is_one_token_over_and_over_is_refused(
    bitrank: CommandLine, road: Road, tmp_path: Path, command: str
) -> None:
    (tmp_path / "same.txt").write_text("\x00" * 3000)
    outcome = bitrank(command, road.model, "--text", tmp_path / "same.txt")
    assert outcome.code == 1
    assert "one token repeated" in outcome.complaint


def overflowing(road: Road, target: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(road.model, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("command", ["fidelity", "cliff", "profile"])
def test_logits_that_are_not_numbers_are_named(
    bitrank: CommandLine, road: Road, tmp_path: Path, command: str
) -> None:
    arguments = ("-o", "out") if command == "profile" else ()
    outcome = bitrank(command, overflowing(road, tmp_path / "hot"), *arguments, "--tokens", "1024")
    assert outcome.code == 1
    assert "hot" in outcome.complaint
    assert "NaN or infinite in float32" in outcome.complaint
    assert not list(bitrank.folder.glob("*.json"))


def test_a_compressed_checkpoint_has_nothing_to_study(bitrank: CommandLine, road: Road) -> None:
    for command in ("fidelity", "spectrum", "cliff"):
        assert "already compressed" in bitrank(command, road.checkpoint).complaint


def test_a_full_disk_leaves_no_half_written_file(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("spectrum", road.model, "-o", "s.json", file_bytes=1000)
    assert outcome.code == 1
    assert "cannot write" in outcome.complaint
    assert not list(bitrank.folder.glob("*s.json*"))


# The page, in a real browser


@pytest.fixture(scope="module")
def page_of() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable)
        yield browser.new_page
        browser.close()


@pytest.mark.parametrize(
    ("command", "charts"), [("fidelity", 4), ("spectrum", 2), ("cliff", 3), ("compare", 1)]
)
def test_a_page_draws_its_charts_and_asks_for_nothing(
    bitrank: CommandLine, road: Road, page_of: Any, command: str, charts: int
) -> None:
    more = {
        "fidelity": ("--calibration", road.text, "--tokens", "1024"),
        "cliff": ("--text", road.text, *CUTS),
    }
    subject = road.profile if command == "compare" else road.model
    assert bitrank(command, subject, "-o", "study.json", *more.get(command, ())).code == 0
    page, problems = page_of(), []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith("file:") else problems.append(request.url)
    )
    page.goto((bitrank.folder / "study.html").as_uri())
    assert page.locator("figure svg[role=img]").count() == charts
    assert problems == []
    page.close()


def test_quality_tells_both_errors_and_that_they_are_one(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("quality", road.model, "--shares", "0.5", "-o", "quality.json")
    assert outcome.code == 0, outcome.stderr
    header, *_, identity, verdicts = outcome.stdout.splitlines()
    assert header.split()[:5] == ["matrix", "rank", "of", "cosine", "relative"]
    assert identity.startswith("cosine² + relative error² is 1 within ") and "truncated SVD" in identity
    assert verdicts.startswith("verdicts by cosine: excellent from 0.99")
    matrices = json.loads((bitrank.folder / "quality.json").read_text())["matrices"]
    assert all(row["cosine"] ** 2 + row["squared_error"] == pytest.approx(1) for row in matrices)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "9999"), "exceeds the smaller side"),
        (("--ranks", "0"), "--ranks cannot be [0]; 1 is the least"),
        (("--shares", "1.5"), "--shares must lie between 0 and 1"),
        (("--factor-bits", "5"), "--factor-bits is 4, 8 or 16, not 5"),
    ],
)
def test_ranks_that_cannot_be_are_refused(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], said: str
) -> None:
    outcome = bitrank("quality", road.model, *arguments, "-o", "quality.json")
    assert outcome.code != 0
    assert said in " ".join(outcome.stderr.replace("│", " ").split())
    assert not (bitrank.folder / "quality.json").exists()
