"""`bitrank kvcache` on the command line."""

from __future__ import annotations

import json

import pytest
from command_line import CommandLine
from road import Road


def measured(bitrank: CommandLine, road: Road, *arguments: str):  # type: ignore[no-untyped-def]
    texts = ("--text", road.text, "--calibration", road.text, "--tokens", "1024")
    return bitrank("kvcache", road.model, *arguments, *texts, "-o", "caches.json")


def test_caches_are_measured_side_by_side(bitrank: CommandLine, road: Road) -> None:
    (bitrank.folder / "ranks.yaml").write_text("'*.k.*.*': 1\n'*': 2\n")
    outcome = measured(
        bitrank, road, "uniform", "manual", "--ranks", "ranks.yaml", "--ratio", "0.5", "--json"
    )
    assert outcome.code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    assert json.loads((bitrank.folder / "caches.json").read_text()) == found
    even, by_hand = found["caches"]
    assert (even["strategy"], by_hand["strategy"], by_hand["mean_rank"]) == ("uniform", "manual", 1.5)
    for row in found["caches"]:
        assert row["held_bytes"] == row["predicted_bytes"] and 0 < row["ratio"] <= 0.5
        assert row["kl_nats"] > 0 and row["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--context", "100000"), "a context of 100000 tokens is not one of"),
        (("--chunk-size", "7"), "chunks of 7 do not divide a head"),
        (("fastest",), "cache strategy 'fastest' is unknown; use one of uniform"),
        (("--preset", "wild"), "preset 'wild' is unknown; use one of conservative"),
        (("manual",), "needs ranks; give a YAML file with --ranks"),
        (("manual", "--ranks", "some.yaml"), "the map has no rank for chunk 0.v.0.0"),
        (("--ratio", "1.5"), "ratio 1.5 is no share of a cache"),
        (("--ratio", "0"), "ratio 0 is no share of a cache"),
        (("--chunk-size", "0"), "chunks of 0 do not divide a head"),
        (("--bits", "5"), "--bits is 4, 8 or 16, not 5"),
    ],
)
def test_caches_that_cannot_be_are_refused(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], said: str
) -> None:
    (bitrank.folder / "some.yaml").write_text("'*.k.*.*': 1\n")
    outcome = measured(bitrank, road, *arguments)
    assert outcome.code != 0
    assert said in " ".join(outcome.stderr.replace("│", " ").split())
    assert not (bitrank.folder / "caches.json").exists()
