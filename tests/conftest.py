"""The road once on a small random model, and the command line to go on from there."""

from pathlib import Path

import pytest
from command_line import CommandLine
from hypothesis import settings
from road import Road, write_model

from profiler.model.checkpoint import DEMO_PATH

settings.register_profile("correctness", deadline=None)
settings.load_profile("correctness")


@pytest.fixture
def bitrank(tmp_path: Path) -> CommandLine:
    """The command line, in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    return CommandLine(folder)


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The whole road once, through the command line."""
    made = Road(tmp_path_factory.mktemp("road"))
    run = CommandLine(made.folder)
    write_model(made.model)
    made.text.write_text(
        (DEMO_PATH / "calibration.txt").read_text(encoding="utf-8")[:12_000], encoding="utf-8"
    )
    for arguments in (
        made.profiling(made.profile),
        ("plan", made.profile, "--budget", "3.2bpw", "-o", made.plan),
        ("compress", made.plan, "-o", made.checkpoint),
    ):
        outcome = run(*arguments)
        assert outcome.code == 0, outcome.stderr
    return made
