"""One process at a time in a directory; whatever ends the process ends its hold."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from allocator.atomic import InUseError, alone

HOLD = "import sys, time; from pathlib import Path; from allocator.atomic import alone\n"
HOLD += "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_directory_that_another_process_holds_is_refused_until_it_dies(tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match="another process is writing .*out; wait for it"), alone(output):
            pass
        holder.send_signal(signal.SIGKILL)
    with alone(output):
        assert output.is_dir()


def test_nothing_is_left_of_a_hold_under_which_nothing_was_written(tmp_path: Path) -> None:
    with alone(tmp_path / "deep" / "out"):
        pass
    assert not (tmp_path / "deep" / "out").exists()


def test_what_was_written_stays_and_the_lock_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="halfway"), alone(tmp_path / "out"):
        (tmp_path / "out" / "file").write_text("kept")
        raise ValueError("halfway")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["file"]
