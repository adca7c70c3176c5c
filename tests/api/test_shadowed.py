"""A folder of the user's that has the name of one of bitrank's packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from service_process import ServiceProcess, environment

SCRIPT = Path(sys.executable).parent / "bitrank"


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with packages that cannot be imported."""
    for name in ("api", "profiler"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_finds_its_own(shadowed: Path) -> None:
    finished = subprocess.run([SCRIPT, "plan", "--help"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "--budget" in finished.stdout


def test_a_worker_finds_its_own(shadowed: Path) -> None:
    command = [sys.executable, "-P", "-m", "api.cli.jobs", "worker", "--while-stdin-is-open"]
    finished = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        env=environment(shadowed / "data"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "the wrong package" not in finished.stderr
    assert finished.returncode == 0, finished.stderr


def test_a_server_finds_its_own(shadowed: Path) -> None:
    server = ServiceProcess(shadowed / "data")
    assert server.client.get("/healthz").status_code == 200
    server.stop()
    assert "the wrong package" not in server.log
