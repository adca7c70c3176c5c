"""`bitrank recover` given what it cannot use, or killed."""

import signal
from pathlib import Path

from command_line import CommandLine
from refusals import assert_refused, contents
from road import Road, write_model


def test_only_a_compressed_checkpoint_is_recovered(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("recover", road.model, "--reference", road.model, "-o", "out", "--text", road.text)
    assert_refused(outcome, bitrank.folder, "out", "has no compressed layer", "`bitrank compress`")


def test_a_checkpoint_is_not_recovered_towards_a_model_of_another_vocabulary(
    bitrank: CommandLine, road: Road
) -> None:
    write_model(bitrank.folder / "wide", vocabulary=8200)
    outcome = bitrank("recover", road.checkpoint, "--reference", "wide", "-o", "out", "--text", road.text)
    assert_refused(outcome, bitrank.folder, "out", "8192", "8200", "give the model it was made from")


def test_recovery_leaves_an_output_in_use_alone(bitrank: CommandLine, road: Road) -> None:
    output = bitrank.folder / "out"
    output.mkdir()
    (output / "mine").write_text("kept")
    outcome = bitrank("recover", road.checkpoint, "--reference", road.model, "-o", "out", "--text", road.text)
    assert outcome.code == 1
    assert "already exists and is not empty" in outcome.complaint
    assert contents(output) == {"mine": b"kept"}


def test_a_killed_recovery_is_resumed_to_the_same_bytes(bitrank: CommandLine, road: Road) -> None:
    def arguments(output: str) -> tuple[str | Path, ...]:
        source = ("recover", road.checkpoint, "--reference", road.model, "--text", road.text)
        return (*source, "-o", output, "--steps", "60")

    assert bitrank(*arguments("whole")).code == 0
    state = bitrank.folder / "out.partial" / "recovery.safetensors"
    assert bitrank.start(*arguments("out")).send(signal.SIGKILL, state.exists).code == -9
    assert not (bitrank.folder / "out").exists()
    assert bitrank(*arguments("out")).code == 0
    assert contents(bitrank.folder / "out") == contents(bitrank.folder / "whole")
    assert not state.parent.exists()
