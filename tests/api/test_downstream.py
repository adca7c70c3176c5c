"""`bitrank downstream` on the command line."""

from __future__ import annotations

import json

import pytest
from command_line import CommandLine
from road import Road

from profiler.model.checkpoint import DEMO_PATH

pytest.importorskip("lm_eval")
TEXT = ("--text", DEMO_PATH / "evaluation.txt", "--documents", "20")
PLANS = ("2.5bpw", "uniform:2", "uniform:3")


def test_plans_are_set_against_tasks(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("downstream", road.profile, *PLANS, *TEXT, "-o", "found.json", "--json")
    assert outcome.code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert json.loads((bitrank.folder / "found.json").read_text()) == found
    assert [row["plan"] for row in found["plans"]] == ["original", *PLANS]
    original, *compressed = found["plans"]
    assert original["kl_nats"] == 0 and all(row["kl_nats"] > 0 for row in compressed)
    assert [task["task"] for task in found["tasks"]] == ["cloze", "last_word"]
    assert found["text"]["task"] == "perplexity" and found["text"]["pairs"] == 6
    for task in found["tasks"]:
        assert task["documents"] == 20 and all(
            0 <= row["scores"][task["task"]] <= 1 for row in found["plans"]
        )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("2.5bpw", "uniform:3", *TEXT), 1, "2 plans tell nothing of an order; give 3 at least"),
        (
            ("2.5bpw", "uniform:2", "progressive:fall", *TEXT),
            2,
            "progressive:fall has no size of its own; give budgets",
        ),
        ((*PLANS,), 1, "there is nothing to test on; give --tasks, or --text"),
        ((*PLANS, "--tasks", "."), 1, "has no task file of lm-evaluation-harness"),
        ((*PLANS, "--text", "absent.txt"), 1, "cannot read absent.txt"),
    ],
)
def test_what_cannot_be_set_against_tasks_is_refused(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], code: int, said: str
) -> None:
    outcome = bitrank("downstream", road.profile, *arguments, "-o", "found.json")
    assert outcome.code == code, outcome.stderr
    assert said in " ".join(outcome.stderr.split())
    assert not (bitrank.folder / "found.json").exists()
