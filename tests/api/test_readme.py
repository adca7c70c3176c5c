"""The quick start of the README, line by line in a shell, against the server it starts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.plan import Plan
from benchmarks.cluster import free_port

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 900


def quick_start() -> str:
    """The README's only block of bash."""
    (found,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return found


def test_the_quick_start_leads_from_nothing_to_a_plan(tmp_path: Path) -> None:
    """Only the port is another, for 8000 may be taken."""
    if shutil.which("curl") is None or not Path(sys.executable).with_name("bitrank").exists():
        pytest.skip("curl or the command bitrank is not installed")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BITRANK_")}
    script = quick_start().replace("8000", str(free_port()))
    shell = subprocess.Popen(
        ["bash", "-e", "-u", "-o", "pipefail", "-c", script],
        cwd=tmp_path,
        env=clean
        | {
            "HOME": str(tmp_path),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
        },
        stdout=(tmp_path / "output").open("wb"),
        stderr=(tmp_path / "log").open("wb"),
        start_new_session=True,
    )
    try:
        assert shell.wait(PATIENCE_SECONDS) == 0, (tmp_path / "log").read_text()
    finally:
        os.killpg(shell.pid, signal.SIGTERM)
    output = (tmp_path / "output").read_text()
    assert output.startswith('{"status":"ok"}')
    assert [line for line in output.splitlines() if line.startswith("event: ")][-1] == "event: done"
    plan = Plan.model_validate(json.loads((tmp_path / "plan.json").read_text()))
    assert (plan.model.id, plan.budget.text, len(plan.layers)) == ("demo", "3.25bpw", 84)
    assert plan.total_bytes <= plan.budget.bytes
