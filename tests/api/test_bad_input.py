"""Whatever goes wrong: one line that says what, why and what to do, the right exit code, no debris."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import CommandLine
from refusals import assert_refused, contents, debris, edit_json, edit_weights
from road import Road, write_model


@pytest.fixture
def model(road: Road, bitrank: CommandLine) -> Path:
    """A copy of the small model to damage."""
    return shutil.copytree(road.model, bitrank.folder / "model")


# Models


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "no-such-owner/no-such-model"])
def test_a_missing_model_is_named(bitrank: CommandLine, name: str) -> None:
    assert_refused(bitrank("profile", name, "-o", "out"), bitrank.folder, "out", name)


def test_a_directory_without_a_model_is_refused(bitrank: CommandLine) -> None:
    (bitrank.folder / "empty").mkdir()
    assert_refused(bitrank("profile", "empty", "-o", "out"), bitrank.folder, "out", "no config.json", "give")


def test_a_truncated_weight_file_is_named(bitrank: CommandLine, model: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "model.safetensors", "truncated", "copy the model again")


def test_a_missing_shard_is_named(bitrank: CommandLine, model: Path) -> None:
    names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "model-00002-of-00002", "missing", "copy the model again")


def test_a_missing_weight_is_named_and_not_filled_with_random_numbers(
    bitrank: CommandLine, model: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(model, lambda tensors: tensors.pop(name))
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", name, "lacks", "copy the model again")


def test_a_weight_of_another_shape_is_named(bitrank: CommandLine, model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(intermediate_size=96))
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "down_proj", "(64, 128)", "(64, 96)", "copy the model")


def test_an_unknown_architecture_is_named(bitrank: CommandLine, model: Path) -> None:
    edit_json(model / "config.json", lambda config: config.update(model_type="martian"))
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "martian", "cannot be loaded", "give one")


def test_code_that_comes_with_a_model_is_not_run(bitrank: CommandLine, model: Path) -> None:
    (model / "custom.py").write_text("open('ran', 'w')\n")
    custom = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    edit_json(model / "config.json", lambda config: config.update(model_type="martian", auto_map=custom))
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "custom code")
    assert not (bitrank.folder / "ran").exists()


@pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": "llama", "num_attention_heads": 0}'])
def test_a_damaged_configuration_is_refused(bitrank: CommandLine, model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert_refused(bitrank("profile", "model", "-o", "out"), bitrank.folder, "out", "model", ";")


def test_pickled_weights_are_not_opened(bitrank: CommandLine, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "pickled", "can run code", "convert them to safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_is_named(bitrank: CommandLine, model: Path, value: float) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    edit_weights(model, lambda tensors: tensors[name][3].fill_(value))
    outcome = bitrank("profile", "model", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", name, "NaN or infinite", "again")


def test_a_compressed_checkpoint_is_not_profiled(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("profile", road.checkpoint, "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "already compressed", "profile the model it was made from")


def test_a_device_that_is_not_there_is_named(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("profile", road.model, "-o", "out", "--device", "abacus")
    assert_refused(outcome, bitrank.folder, "out", "'abacus'", "--device cpu")


def test_models_of_different_vocabularies_are_not_compared(bitrank: CommandLine, road: Road) -> None:
    write_model(bitrank.folder / "wide", vocabulary=8200)
    outcome = bitrank("evaluate", road.checkpoint, "--reference", "wide", "--text", road.text)
    assert_refused(outcome, bitrank.folder, "out", "8192", "8200", "give the model it was made from")


# Text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is empty; give"),
        (b" \n\t\n", "is empty; give"),
        (b"Too short by far.", "give at least 64"),
        (b"Two windows of text, no more. " * 20, "give at least 192"),
        (b"\xff\xfe\x00 not UTF-8", "as UTF-8 text"),
    ],
)
def test_calibration_text_that_is_no_sample_is_refused(
    bitrank: CommandLine, road: Road, text: bytes, said: str
) -> None:
    (bitrank.folder / "text.txt").write_bytes(text)
    outcome = bitrank("profile", road.model, "-o", "out", "--calibration", "text.txt")
    assert_refused(outcome, bitrank.folder, "out", "text.txt", said)


def test_a_missing_calibration_text_is_named(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("profile", road.model, "-o", "out", "--calibration", "nowhere.txt")
    assert_refused(outcome, bitrank.folder, "out", "nowhere.txt", "give a UTF-8 text")


def test_too_few_tokens_are_refused(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("profile", road.model, "-o", "out", "--tokens", "191")
    assert_refused(outcome, bitrank.folder, "out", "--tokens 191", "give at least 192")


def test_three_windows_are_enough(bitrank: CommandLine, road: Road) -> None:
    small = ("--bits", "2", "--ranks", "0", "--group-sizes", "64", "--tokens", "192")
    outcome = bitrank("profile", road.model, "-o", "out", "--calibration", road.text, *small)
    assert outcome.code == 0, outcome.stderr
    assert bitrank("plan", "out", "--budget", "3bpw").code == 0


def test_text_in_which_the_tokenizer_finds_nothing_is_refused(bitrank: CommandLine, model: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(model)
    (bitrank.folder / "text.txt").write_text("0123456789 " * 1000)
    outcome = bitrank("profile", "model", "-o", "out", "--calibration", "text.txt")
    assert_refused(outcome, bitrank.folder, "out", "text.txt", "0 tokens", "give at least 64")


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(bitrank: CommandLine, road: Road) -> None:
    write_model(bitrank.folder / "narrow", vocabulary=512)
    outcome = bitrank("profile", "narrow", "-o", "out", "--calibration", road.text)
    assert_refused(outcome, bitrank.folder, "out", "tokenizer", "512", "copy the model's own")


def test_evaluation_text_without_words_is_refused(bitrank: CommandLine, road: Road) -> None:
    (bitrank.folder / "text.txt").write_text("\n")
    outcome = bitrank("evaluate", road.checkpoint, "--reference", road.model, "--text", "text.txt")
    assert_refused(outcome, bitrank.folder, "out", "text.txt is empty", "give at least 64 tokens")


# Budgets and strategies


def test_a_budget_below_the_floor_names_the_smallest_feasible_one(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("plan", road.profile, "--budget", "1bpw", "-o", "plan.json")
    assert_refused(outcome, bitrank.folder, "plan.json", "1bpw", "smallest feasible", "raise", code=3)
    smallest = outcome.complaint.split(" or ")[1].split(")")[0]
    assert bitrank("plan", road.profile, "--budget", smallest, "-o", "plan.json").code == 0


def test_a_strategy_larger_than_the_budget_says_what_it_takes(bitrank: CommandLine, road: Road) -> None:
    arguments = ("plan", road.profile, "--strategy", "uniform:4", "-o", "plan.json")
    outcome = bitrank(*arguments, "--budget", "3bpw")
    assert_refused(outcome, bitrank.folder, "plan.json", "uniform:4", "raise it to", code=3)
    enough = outcome.complaint.split(" or ")[1]
    assert bitrank(*arguments, "--budget", enough).code == 0


def test_a_budget_above_the_original_is_refused(bitrank: CommandLine, road: Road) -> None:
    outcome = bitrank("plan", road.profile, "--budget", "1GiB", "-o", "plan.json")
    assert_refused(outcome, bitrank.folder, "plan.json", "1GiB", "more than the original", "lower the budget")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--budget", "3furlongs"), ("unknown unit 'furlongs'", "3.25bpw")),
        (("--budget", "much"), ("'much'", "write it like")),
        (("--budget", "0%"), ("out of range", "write it like")),
        ((), ("budget is missing", "--budget")),
        (("--strategy", "uniforn:3"), ("'uniforn:3' is unknown", "did you mean 'uniform'")),
        (("--strategy", "uniform:three"), ("malformed", "write uniform:BITS")),
        (("--strategy", "uniform:8"), ("does not offer 8 bits", "choose another")),
    ],
)
def test_a_budget_or_strategy_that_cannot_be_read_is_wrong_usage(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    outcome = bitrank("plan", road.profile, *arguments, "-o", "plan.json")
    assert_refused(outcome, bitrank.folder, "plan.json", *said, code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", "demo", "-o", "out", "--bits", "3,x"),
        ("profile", "demo", "-o", "out", "--bits", "7"),
        ("profile", "demo", "-o", "out", "--group-sizes", "100"),
        ("profile", "demo", "-o", "out", "--tokens", "0"),
        ("profile", "demo"),
        ("predict",),
    ],
)
def test_arguments_that_make_no_sense_are_wrong_usage(
    bitrank: CommandLine, arguments: tuple[str, ...]
) -> None:
    outcome = bitrank(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.stderr
    assert not (bitrank.folder / "out").exists()


# Plans and profiles


def test_a_plan_for_another_model_is_refused(bitrank: CommandLine, road: Road, model: Path) -> None:
    edit_weights(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    plan = shutil.copyfile(road.plan, bitrank.folder / "plan.json")
    edit_json(plan, lambda document: document["model"].update(id=str(model)))
    outcome = bitrank("compress", plan, "-o", "out", "--profile", road.profile)
    said = ("weights", "not those the plan was made for", "plan again")
    assert_refused(outcome, bitrank.folder, "out", *said)
    assert not (bitrank.folder / "out.partial").exists()


def test_a_plan_without_its_profile_asks_for_it(bitrank: CommandLine, road: Road) -> None:
    plan = shutil.copyfile(road.plan, bitrank.folder / "plan.json")
    outcome = bitrank("compress", plan, "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "plan.json", "not to be found", "--profile")


def test_a_profile_beside_a_plan_is_found_among_unreadable_ones(bitrank: CommandLine, road: Road) -> None:
    plan = shutil.copyfile(road.plan, bitrank.folder / "plan.json")
    (bitrank.folder / "a").mkdir()
    (bitrank.folder / "a" / "profile.json").write_text("{")
    shutil.copytree(road.profile, bitrank.folder / "b")
    assert bitrank("compress", plan, "-o", "out").code == 0


def newer(document: dict[str, Any]) -> None:
    document.update(schema_version=99, invented_later=True)


def test_a_plan_from_a_newer_schema_asks_for_an_upgrade(bitrank: CommandLine, road: Road) -> None:
    plan = shutil.copyfile(road.plan, bitrank.folder / "plan.json")
    edit_json(plan, newer)
    outcome = bitrank("compress", plan, "-o", "out", "--profile", road.profile)
    assert_refused(outcome, bitrank.folder, "out", "schema 99", "upgrade bitrank")


def test_a_profile_from_a_newer_schema_asks_for_an_upgrade(bitrank: CommandLine, road: Road) -> None:
    profile = shutil.copytree(road.profile, bitrank.folder / "profile")
    edit_json(profile / "profile.json", newer)
    outcome = bitrank("plan", profile, "--budget", "3bpw", "-o", "plan.json")
    assert_refused(outcome, bitrank.folder, "plan.json", "schema 99", "upgrade bitrank")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 1}', '{"schema_version": "one"}'])
def test_a_file_that_is_no_plan_is_refused(bitrank: CommandLine, text: str) -> None:
    (bitrank.folder / "plan.json").write_text(text)
    outcome = bitrank("compress", "plan.json", "-o", "out")
    assert_refused(outcome, bitrank.folder, "out", "plan.json is not a bitrank plan", "give a file")


@pytest.mark.parametrize("damaged", ["profile.json", "measurements.parquet"])
def test_a_damaged_profile_is_refused(bitrank: CommandLine, road: Road, damaged: str) -> None:
    profile = shutil.copytree(road.profile, bitrank.folder / "profile")
    os.truncate(profile / damaged, (profile / damaged).stat().st_size // 2)
    outcome = bitrank("plan", profile, "--budget", "3bpw", "-o", "plan.json")
    assert_refused(outcome, bitrank.folder, "plan.json", "profile the model again")


def test_a_directory_that_is_no_profile_is_refused(bitrank: CommandLine) -> None:
    outcome = bitrank("plan", "nowhere", "--budget", "3bpw", "-o", "plan.json")
    assert_refused(outcome, bitrank.folder, "plan.json", "nowhere", "give one")


@pytest.mark.parametrize("command", ["profile", "compress"])
def test_an_output_directory_in_use_is_left_alone(bitrank: CommandLine, road: Road, command: str) -> None:
    output = bitrank.folder / "out"
    output.mkdir()
    (output / "diary.txt").write_text("mine")
    arguments = road.profiling(output) if command == "profile" else ("compress", road.plan, "-o", output)
    outcome = bitrank(*arguments)
    assert outcome.code == 1
    assert "not empty; choose another directory or remove it" in outcome.complaint
    assert contents(output) == {"diary.txt": b"mine"}
    assert not debris(bitrank.folder)


def test_another_profile_is_not_overwritten(bitrank: CommandLine, road: Road) -> None:
    profile = shutil.copytree(road.profile, bitrank.folder / "profile")
    outcome = bitrank(*road.profiling(profile), "--seed", "1")
    assert outcome.code == 1
    assert "already holds another profile" in outcome.complaint
    assert contents(profile) == contents(road.profile)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("ultimate",), 2, "strategy 'ultimate' is unknown"),
        (("progressive:fall",), 2, "progressive:fall has no size of its own; give --budget"),
        (("uniform:7",), 2, "does not offer 7 bits"),
        (("progressive:fall", "--budget", "1bpw"), 3, "smallest"),
        (("uniform:3", "--share", "0.1"), 3, "smallest"),
    ],
)
def test_strategies_that_cannot_be_compared_are_refused(
    bitrank: CommandLine, road: Road, arguments: tuple[str, ...], code: int, said: str
) -> None:
    outcome = bitrank("compare", road.profile, *arguments)
    assert_refused(outcome, bitrank.folder, "out", said, code=code)
