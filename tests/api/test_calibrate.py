"""`bitrank calibrate` given what it cannot use, or cut off: one clear line, nothing half-written, and it resumes."""

import shutil
import signal
from pathlib import Path

import pytest
from command_line import CommandLine
from refusals import assert_refused, contents, debris, edit_json, edit_weights
from road import Road


@pytest.fixture
def model(road: Road, bitrank: CommandLine) -> Path:
    """A copy of the small model to damage."""
    return shutil.copytree(road.model, bitrank.folder / "model")


def calibrating(profile: Path, output: Path | str) -> tuple[str | Path, ...]:
    return ("calibrate", profile, "-o", output, "--plans", "10")


@pytest.fixture(scope="module")
def calibrated(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's profile, calibrated without disturbance. Read-only."""
    folder = tmp_path_factory.mktemp("calibrated")
    outcome = CommandLine(folder)(*calibrating(road.profile, "out"))
    assert outcome.code == 0, outcome.stderr
    return folder / "out"


@pytest.mark.parametrize("plans", ["9", "-1"])
def test_too_few_plans_to_calibrate_on_are_refused(bitrank: CommandLine, road: Road, plans: str) -> None:
    outcome = bitrank("calibrate", road.profile, "-o", "out", "--plans", plans)
    said = (f"{plans} plans are too few", "measure 10 at least")
    assert_refused(outcome, bitrank.folder, "out", *said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"One window of text and no more. " * 10, ("one window of 64 tokens", "give more text")),
        (b"." * 2000, ("text.txt is one token repeated", "give text that the model was trained on")),
    ],
)
def test_text_to_calibrate_on_that_is_no_sample_is_refused(
    bitrank: CommandLine, road: Road, text: bytes, said: tuple[str, ...]
) -> None:
    (bitrank.folder / "text.txt").write_bytes(text)
    outcome = bitrank(*calibrating(road.profile, "out"), "--text", "text.txt")
    assert_refused(outcome, bitrank.folder, "out", *said)


def test_a_missing_text_to_calibrate_on_is_named(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank(*calibrating(road.profile, "out"), "--text", "nowhere.txt")
    assert_refused(outcome, bitrank.folder, "out", "nowhere.txt", "cannot read", "as UTF-8 text")


def test_fewer_tokens_to_calibrate_on_than_two_windows_are_refused(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank(*calibrating(road.profile, "out"), "--text", road.text, "--tokens", "64")
    assert_refused(outcome, bitrank.folder, "out", "one window of 64 tokens", "more --tokens")


def test_a_profile_of_other_weights_is_not_calibrated(bitrank: CommandLine, road: Road, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    profile = shutil.copytree(road.profile, bitrank.folder / "profile")
    edit_json(profile / "profile.json", lambda document: document["model"].update(id=str(model)))
    before = contents(profile)
    outcome = bitrank(*calibrating(profile, "out"))
    assert_refused(outcome, bitrank.folder, "out", "weights", str(model), str(profile), "profile this model")
    assert contents(profile) == before


def test_what_is_no_profile_is_not_calibrated(bitrank: CommandLine) -> None:
    outcome = bitrank(*calibrating(Path("nowhere"), "out"))
    assert_refused(outcome, bitrank.folder, "out", "nowhere is not a profile directory", "give one")


@pytest.mark.parametrize(
    ("file", "why"),
    [("diary.txt", "already exists and is not empty"), ("profile.json", "already holds another profile")],
)
def test_calibrate_leaves_an_output_directory_in_use_alone(
    bitrank: CommandLine, road: Road, file: str, why: str
) -> None:
    output = bitrank.folder / "out"
    output.mkdir()
    (output / file).write_text("mine")
    outcome = bitrank(*calibrating(road.profile, "out"))
    assert (outcome.code, outcome.stdout) == (1, "")
    assert f"out {why}; choose another directory or remove it" in outcome.complaint
    assert contents(output) == {file: b"mine"}


def test_another_calibration_is_not_overwritten(bitrank: CommandLine, road: Road, calibrated: Path) -> None:
    output = shutil.copytree(calibrated, bitrank.folder / "out")
    outcome = bitrank(*calibrating(road.profile, "out"), "--seed", "1")
    assert (outcome.code, outcome.stdout) == (1, "")
    assert "out already holds another profile; choose another directory" in outcome.complaint
    assert contents(output) == contents(calibrated)


def test_an_interrupted_calibration_is_resumed_to_the_same_bytes(
    bitrank: CommandLine, road: Road, calibrated: Path
) -> None:
    output = bitrank.folder / "out"
    row = output / ".work" / "1.windows.safetensors"
    outcome = bitrank.start(*calibrating(road.profile, "out")).send(signal.SIGINT, row.exists)
    assert outcome.code == 130, outcome.stderr
    assert outcome.complaint == "interrupted; run the same command again to resume"
    assert not (output / "profile.json").exists()
    assert not debris(bitrank.folder)
    assert "unfinished" in bitrank("plan", "out", "--budget", "3bpw").complaint

    assert bitrank(*calibrating(road.profile, "out")).code == 0
    assert contents(output) == contents(calibrated)


@pytest.mark.parametrize("file_bytes", [100, 100_000])
def test_a_full_disk_leaves_no_calibrated_profile_and_is_resumed(
    bitrank: CommandLine, road: Road, calibrated: Path, file_bytes: int
) -> None:
    """The limits fall on the request, a packed layer, the block inputs and the logits."""
    output = bitrank.folder / "out"
    outcome = bitrank(*calibrating(road.profile, "out"), file_bytes=file_bytes)
    assert (outcome.code, outcome.stdout) == (1, ""), outcome.stderr
    assert "File too large" in outcome.complaint
    assert "free some space" in outcome.complaint
    assert not (output / "profile.json").exists()
    assert not debris(bitrank.folder)

    again = bitrank(*calibrating(road.profile, "out"))
    assert again.code == 0, again.stderr
    assert contents(output) == contents(calibrated)


def test_a_calibration_killed_while_it_writes_is_resumed(
    bitrank: CommandLine, road: Road, calibrated: Path
) -> None:
    output = bitrank.folder / "out"
    (output / ".work").mkdir(parents=True)
    (output / ".calibrated.txt.1.tmp").write_text("hal")
    outcome = bitrank(*calibrating(road.profile, "out"))
    assert outcome.code == 0, outcome.stderr
    assert contents(output) == contents(calibrated)
