"""Tasks by lm-evaluation-harness: made of a text, found in a folder, run on a model, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from profiler.model.checkpoint import DEMO, DEMO_PATH, find_model
from profiler.model.layers import LoadedModel, load_model
from profiler.studies.downstream import TaskError, find_tasks, make_tasks, task_scores

pytest.importorskip("lm_eval")
TEXT = DEMO_PATH / "evaluation.txt"


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(find_model(DEMO))


def rows(folder: Path, task: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tasks_made_of_a_text_ask_for_what_follows_in_it(demo: LoadedModel, tmp_path: Path) -> None:
    tasks = make_tasks(demo, TEXT, tmp_path, 30)
    assert tasks == find_tasks(tmp_path, ())
    plain = " ".join(TEXT.read_text(encoding="utf-8").split())
    for cloze, last in zip(rows(tmp_path, "cloze"), rows(tmp_path, "last_word"), strict=True):
        right = cloze["choices"][cloze["answer"]]  # type: ignore[index]
        assert f"{cloze['context']}{right}" in plain
        assert len(set(cloze["choices"])) == 4  # type: ignore[arg-type]
        assert f"{last['context']} {last['word']}" in plain


def test_the_same_text_makes_the_same_tasks(demo: LoadedModel, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        make_tasks(demo, TEXT, tmp_path / name, 30)
    assert rows(tmp_path / "one", "cloze") == rows(tmp_path / "other", "cloze")


def test_scores_are_those_of_the_models_own_likelihoods(demo: LoadedModel, tmp_path: Path) -> None:
    tasks = make_tasks(demo, TEXT, tmp_path, 24)
    found = task_scores(demo, tasks, None, 8)
    assert set(found) == {"cloze", "last_word"} and found["cloze"].shape == (24,)
    assert set(np.unique(found["cloze"])) <= {0.0, 1.0} and found["cloze"].mean() > 0.4

    def likelihood(context: str, continuation: str) -> float:
        start = len(demo.tokenizer(context)["input_ids"])
        ids_T = torch.tensor(demo.tokenizer(context + continuation)["input_ids"])
        with torch.no_grad():
            log_p_TV = demo.model(ids_T[None]).logits[0].log_softmax(-1)
        return float(sum(log_p_TV[t - 1, ids_T[t]] for t in range(start, len(ids_T))))

    for row, score in zip(rows(tmp_path, "cloze")[:6], found["cloze"], strict=False):
        values = [likelihood(str(row["context"]), choice) for choice in row["choices"]]  # type: ignore[attr-defined]
        assert not any(map(math.isnan, values))
        assert (int(np.argmax(values)) == row["answer"]) == bool(score)


def test_a_limit_takes_the_first_documents(demo: LoadedModel, tmp_path: Path) -> None:
    tasks = find_tasks(make_tasks(demo, TEXT, tmp_path, 24).folder, ("cloze",))
    found = task_scores(demo, tasks, 5, 8)
    assert list(found) == ["cloze"] and len(found["cloze"]) == 5


def test_tasks_that_cannot_be_run_are_refused(
    demo: LoadedModel, tiny_llama: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short\n\nby far")
    with pytest.raises(TaskError, match="0 paragraphs of .* have more than 38 words that fit"):
        make_tasks(demo, tmp_path / "short.txt", tmp_path, 10)
    with pytest.raises(TaskError, match="cannot read .*absent.txt as UTF-8 text"):
        make_tasks(demo, tmp_path / "absent.txt", tmp_path, 10)
    with pytest.raises(TaskError, match="has no task file of lm-evaluation-harness"):
        find_tasks(tmp_path / "absent", ())
    tasks = make_tasks(demo, TEXT, tmp_path, 24)
    with pytest.raises(TaskError, match="task 'close' is not in .* did you mean 'cloze'"):
        find_tasks(tmp_path, ("close",))
    with pytest.raises(TaskError, match="has no tokenizer to read tasks with"):
        task_scores(tiny_llama, tasks, 2, 8)
    (tmp_path / "cloze.jsonl").unlink()
    with pytest.raises(
        TaskError, match="lm-evaluation-harness cannot run cloze, last_word .*; check the task files"
    ):
        task_scores(demo, tasks, 2, 8)
