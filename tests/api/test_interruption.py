"""Commands on disks that fill up, interrupted, killed or run twice at once: nothing is lost, nothing half-written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import CommandLine, Outcome
from refusals import assert_refused, contents, debris
from road import Road

ROOT = Path(__file__).parents[2]


# Disks that fill up


@pytest.mark.parametrize("file_bytes", [200, 100_000])
def test_a_full_disk_leaves_no_finished_profile_and_is_resumed(
    bitrank: CommandLine, road: Road, file_bytes: int
) -> None:
    """The limits fall on the request and the block inputs."""
    outcome = bitrank(*road.profiling("out"), file_bytes=file_bytes)
    assert outcome.code == 1
    assert "File too large" in outcome.complaint
    assert "free some space" in outcome.complaint
    assert not (bitrank.folder / "out" / "profile.json").exists()
    assert not debris(bitrank.folder)
    assert "unfinished" in bitrank("plan", "out", "--budget", "3bpw").complaint

    assert bitrank(*road.profiling("out")).code == 0
    assert contents(bitrank.folder / "out") == contents(road.profile)


def test_a_disk_that_fills_up_after_the_sweep_is_no_crash_either(bitrank: CommandLine, road: Road) -> None:
    """The limit falls on the weights of the tokens beside the profile."""
    layers = bitrank.folder / "out" / ".work" / "layers"

    def swept() -> bool:
        return layers.exists() and sum(file.suffix == ".json" for file in layers.iterdir()) == 14

    assert bitrank.start(*road.profiling("out")).send(signal.SIGINT, swept).code == 130
    outcome = bitrank(*road.profiling("out"), file_bytes=40_000)
    assert outcome.code == 1
    assert "File too large" in outcome.complaint
    assert not (bitrank.folder / "out" / "profile.json").exists()
    assert not debris(bitrank.folder)

    assert bitrank(*road.profiling("out")).code == 0
    assert contents(bitrank.folder / "out") == contents(road.profile)


def test_a_full_disk_keeps_the_old_plan(bitrank: CommandLine, road: Road) -> None:
    plan = bitrank.folder / "plan.json"
    plan.write_text("old")
    outcome = bitrank("plan", road.profile, "--budget", "3bpw", "-o", plan, file_bytes=1_000)
    assert outcome.code == 1
    assert "free some space" in outcome.complaint
    assert plan.read_text() == "old"
    assert not debris(bitrank.folder)


def test_a_full_disk_leaves_no_finished_checkpoint_and_is_resumed(bitrank: CommandLine, road: Road) -> None:
    arguments = ("compress", road.plan, "-o", "out", "--profile", road.profile)
    outcome = bitrank(*arguments, file_bytes=100_000)
    assert_refused(outcome, bitrank.folder, "out", "File too large", "free some space")
    assert bitrank(*arguments).code == 0
    assert contents(bitrank.folder / "out") == contents(road.checkpoint)
    assert not (bitrank.folder / "out.partial").exists()


@pytest.mark.parametrize(
    ("command", "disk"), [("profile", "300k"), ("profile", "480k"), ("compress", "1200k")]
)
def test_a_truly_full_disk_is_an_error_and_not_a_crash(
    tmp_path: Path, road: Road, command: str, disk: str
) -> None:
    """A memory file system in a namespace of its own, which fills up among block inputs, layers and activations."""
    output = tmp_path / "disk" / "out"
    output.parent.mkdir()
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", output.parent]
    if shutil.which("unshare") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this system lets its users mount no file system")
    arguments = road.profiling(output)
    if command == "compress":
        arguments = ("compress", road.plan, "-o", output, "--profile", road.profile)
    script = 'mount -t tmpfs -o size="$1" tmpfs "$0" && shift && "$@"; code=$?; find "$0" -name "*.tmp"; exit $code'
    inside = ["unshare", "-rm", "sh", "-c", script, output.parent, disk]
    process = subprocess.run(
        [*inside, sys.executable, "-m", "api.main", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "BITRANK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    outcome = Outcome(process.returncode, process.stdout, process.stderr)
    assert outcome.code == 1, process.stderr
    assert "No space left on device" in outcome.complaint
    assert "free some space" in outcome.complaint
    assert outcome.stdout == ""


# Interruptions


def test_an_interrupted_profile_resumes_where_it_was(bitrank: CommandLine, road: Road) -> None:
    """Twice interrupted and then finished, it is the uninterrupted profile to the byte, no layer measured twice."""
    layers = bitrank.folder / "out" / ".work" / "layers"

    def measured(count: int) -> Callable[[], bool]:
        return lambda: layers.exists() and sum(file.suffix == ".json" for file in layers.iterdir()) >= count

    first_block = 4
    for count in (first_block, 9):
        outcome = bitrank.start(*road.profiling("out")).send(signal.SIGINT, measured(count))
        assert outcome.code == 130, outcome.stderr
        assert outcome.complaint == "interrupted; run the same command again to resume"
        assert not debris(bitrank.folder)
        assert count <= len(list(layers.iterdir())) < 14
        if count == first_block:
            finished = {file: file.stat().st_mtime_ns for file in layers.glob("*.layers.0.self_attn.*")}
            assert len(finished) == first_block
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert "unfinished" in bitrank("plan", "out", "--budget", "3bpw").complaint

    assert bitrank(*road.profiling("out")).code == 0
    assert contents(bitrank.folder / "out") == contents(road.profile)


def test_two_processes_do_not_write_one_profile(bitrank: CommandLine, road: Road) -> None:
    """The second is told at once; the first ends as if it had been alone, and after it anyone may ask again."""
    begun = bitrank.folder / "out" / ".work" / "layers"
    second: list[Outcome] = []

    def try_another() -> bool:
        if begun.exists() and not second:
            second.append(bitrank(*road.profiling("out")))
        return bool(second)

    first = bitrank.start(*road.profiling("out"))
    while not try_another():
        time.sleep(0.01)
    assert second[0].code == 1
    assert "another process is writing out; wait for it" in second[0].complaint
    assert first.wait().code == 0
    assert contents(bitrank.folder / "out") == contents(road.profile)
    assert bitrank(*road.profiling("out")).code == 0


def test_a_profile_killed_while_it_writes_is_resumed(bitrank: CommandLine, road: Road) -> None:
    output = bitrank.folder / "out"
    output.mkdir()
    (output / ".request.json.1.tmp").write_text("hal")
    assert bitrank(*road.profiling("out")).code == 0
    assert contents(output) == contents(road.profile)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_checkpoint_is_resumed_to_the_same_bytes(
    bitrank: CommandLine, road: Road, number: signal.Signals, code: int
) -> None:
    arguments = ("compress", road.plan, "-o", "out", "--profile", road.profile)
    partial = bitrank.folder / "out.partial"
    shard = partial / "model-00001-of-00003.safetensors"
    outcome = bitrank.start(*arguments).send(number, shard.exists)
    assert outcome.code == code, outcome.stderr
    assert not (bitrank.folder / "out").exists()
    written = shard.stat().st_mtime_ns

    (partial / ".model-00002-of-00003.safetensors.1.tmp").write_bytes(b"hal")
    (partial / "model-00007-of-00009.safetensors").write_bytes(b"of another plan")
    assert bitrank(*arguments).code == 0
    assert contents(bitrank.folder / "out") == contents(road.checkpoint)
    assert (bitrank.folder / "out" / shard.name).stat().st_mtime_ns == written
    assert not debris(bitrank.folder)
