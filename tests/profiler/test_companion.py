"""Companions: measurements beside a profile, each with its digest; and the dossier that profiling writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from profiler.documents.profile import Profile
from profiler.documents.sidecar import CliffDocument, CompanionError, FidelityDocument, SpectrumDocument
from profiler.model.checkpoint import find_model
from profiler.statistics.calibration import silent
from profiler.sweep.run import ProfileSettings, build_profile


@pytest.fixture
def profile_copy(tiny_profile: Callable[[str], Profile], tmp_path: Path) -> Profile:
    original = tiny_profile("llama")
    shutil.copytree(original.path, tmp_path / "profile")
    return Profile(tmp_path / "profile", original.sha256, original.document, original.measurements)


def weights(profile: Profile) -> str:
    return profile.document.model.weights_sha256


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_profiling_writes_fidelity_and_spectra(
    tiny_profile: Callable[[str], Profile], architecture: str
) -> None:
    profile = tiny_profile(architecture)
    fidelity = FidelityDocument.beside(profile.path, weights(profile))
    spectrum = SpectrumDocument.beside(profile.path, weights(profile))
    assert fidelity is not None and spectrum is not None
    assert fidelity.windows == profile.document.calibration.probe_windows
    assert [block.block for block in fidelity.blocks] == [0, 1]
    assert all(block.probe_kl.mean > 0 for block in fidelity.blocks)
    assert list(spectrum.layers) == list(profile.document.layers)
    assert CliffDocument.beside(profile.path, weights(profile)) is None


def test_blocks_alone_lose_about_what_they_lose_together(tiny_profile: Callable[[str], Profile]) -> None:
    """The probe compresses every block; its measured KL is near the sum over blocks measured one by one."""
    profile = tiny_profile("llama")
    fidelity = FidelityDocument.beside(profile.path, weights(profile))
    together = next(p.measured_kl for p in profile.document.probes if p.option.bits == 3)
    assert fidelity is not None
    assert sum(block.probe_kl.mean for block in fidelity.blocks) == pytest.approx(together, rel=0.5)


def test_a_grid_without_the_probe_setting_has_spectra_alone(
    model_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = ProfileSettings(tokens=640, bits=(4,), ranks=(0,), group_sizes=(64,), rounds=1)
    made = build_profile(find_model(str(model_directory("llama"))), tmp_path / "profile", settings, silent)
    assert FidelityDocument.beside(made.path, weights(made)) is None
    assert SpectrumDocument.beside(made.path, weights(made)) is not None


def test_a_saved_companion_is_read_back_as_it_was(profile_copy: Profile, tmp_path: Path) -> None:
    found = FidelityDocument.load(profile_copy.path / "fidelity.json")
    assert found.save(tmp_path / "again.json") == found
    assert (tmp_path / "again.json").read_bytes() == (profile_copy.path / "fidelity.json").read_bytes()


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_text(path.read_text()[:200]), "is damaged"),
        (lambda path: path.write_text("[]"), "is damaged"),
        (lambda path: change(path, windows=99), "does not match its own digest"),
        (lambda path: change(path, schema_version=2, news=1), "schema 2.*upgrade bitrank"),
    ],
)
def test_a_damaged_companion_says_what_is_wrong(
    profile_copy: Profile, damage: Callable[[Path], None], words: str
) -> None:
    damage(profile_copy.path / "fidelity.json")
    with pytest.raises(CompanionError, match=words):
        FidelityDocument.beside(profile_copy.path, weights(profile_copy))


def test_a_companion_of_other_weights_is_refused(profile_copy: Profile) -> None:
    with pytest.raises(CompanionError, match="other weights"):
        FidelityDocument.beside(profile_copy.path, "f" * 64)
