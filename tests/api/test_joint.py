"""Weights and key-value cache under one budget, on the command line: planned, carried out, measured, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
from command_line import CommandLine
from road import Road

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def own(bitrank: CommandLine, road: Road) -> CommandLine:
    """The command line, with a profile that files may be put beside."""
    shutil.copytree(road.profile, bitrank.folder / "profile")
    return bitrank


def test_a_joint_plan_is_carried_out_and_measured_with_its_cache(own: CommandLine, road: Road) -> None:
    outcome = own("plan", "profile", "--budget", "88%", "--context", "64", "--batch", "4", "--json")
    assert outcome.code == 0, outcome.stderr
    plan = json.loads(outcome.stdout)
    cache = plan["cache"]
    assert plan["total_bytes"] + cache["total_bytes"] <= plan["budget"]["bytes"]
    assert (cache["context"], cache["batch"], len(cache["groups"])) == (64, 4, 4)
    assert "sensitivities" in outcome.stderr

    again = own("plan", "profile", "--budget", "88%", "--context", "64", "--batch", "4", "-o", "again.json")
    assert "sensitivities" not in again.stderr and "cache of 4 × 64 tokens" in again.stdout
    assert (own.folder / "again.json").read_bytes() == (own.folder / "plan.json").read_bytes()

    assert own("compress", "plan.json", "-o", "checkpoint").code == 0
    measured = own("evaluate", "checkpoint", "--reference", road.model, "--text", road.text, "--json")
    assert measured.code == 0, measured.stderr
    found = json.loads(measured.stdout)
    assert found["low_rank_cache"] and found["tensor_bytes"] == plan["total_bytes"]

    (own.folder / "checkpoint" / "kv_cache.bases").unlink()
    weights = json.loads(
        own("evaluate", "checkpoint", "--reference", road.model, "--text", road.text, "--json").stdout
    )
    assert not weights["low_rank_cache"] and weights["kl_nats"] < found["kl_nats"]


def test_a_plan_whose_bases_are_gone_is_not_carried_out(own: CommandLine) -> None:
    assert own("plan", "profile", "--budget", "95%", "--context", "64").code == 0
    (own.folder / "profile" / "kvcache.json").unlink()
    outcome = own("compress", "plan.json", "-o", "checkpoint")
    assert outcome.code == 1 and "does not have the bases" in outcome.stderr
    assert not (own.folder / "checkpoint").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--budget", "88%", "--context", "65"), 1, "a context of 65 tokens is not one of"),
        (("--budget", "88%", "--context", "8"), 1, "use 32 to 64"),
        (
            ("--budget", "3bpw", "--context", "64"),
            2,
            "counts weights alone, but a context asks for a cache too",
        ),
        (("--budget", "1KiB", "--context", "64"), 3, "smallest cache of 1 × 64 tokens"),
        (("--budget", "1GiB", "--context", "64"), 1, "more than the original checkpoint and its plain cache"),
        (("--context", "64"), 2, "a budget is missing"),
        (("--budget", "88%", "--batch", "2"), 2, "--batch goes with --context"),
        (("--budget", "88%", "--context", "64", "--verify"), 2, "leave --server, --verify"),
        (("--budget", "88%", "--context", "64", "--batch", "0"), 2, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_planned_jointly_is_refused(
    own: CommandLine, arguments: tuple[str, ...], code: int, said: str
) -> None:
    outcome = own("plan", "profile", *arguments)
    assert outcome.code == code, outcome.stderr
    assert said in " ".join(outcome.stderr.replace("│", " ").split())
    assert not (own.folder / "plan.json").exists()
