"""Accuracy on tasks, by lm-evaluation-harness, from task files that lie on this machine.

What lives here: two tasks made of any text, and running tasks on a loaded model. What the accuracies say beside KL is
in `task_correlation.py`.

    cloze      which of four continuations follows; the three others follow elsewhere in the text
    last_word  whether greedy decoding gives the last word of a passage
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from allocator.errors import BitrankError
from profiler.model.layers import LoadedModel
from profiler.studies.task_correlation import Floats

CONTEXT_WORDS, CONTINUATION_WORDS, CHOICES = 30, 8, 4
METRICS = ("acc", "acc_norm", "exact_match")
"""Scores of a document that are taken, the first that a task reports."""
FEWEST_DOCUMENTS = 20
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{context}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
{rest}
"""
CLOZE = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer"
LAST_WORD = 'output_type: loglikelihood\ndoc_to_target: " {{word}}"'


class TaskError(BitrankError):
    """Tasks that cannot be run; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Task files of lm-evaluation-harness in a folder, and which of them to run."""

    folder: Path
    names: tuple[str, ...]


def make_tasks(loaded: LoadedModel, path: Path, folder: Path, documents: int, seed: int = 0) -> Tasks:
    """Write `cloze` and `last_word` into a folder, of paragraphs that the model has the context for.

    Raises `TaskError` for a model without a tokenizer, and for a text that cannot be read or has too few paragraphs.
    """
    _check_tokenizer(loaded)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"cannot read {path} as UTF-8 text ({error})") from error
    words = [paragraph.split() for paragraph in text.split("\n\n")]
    size = CONTEXT_WORDS + CONTINUATION_WORDS
    passages = [found[: size + 1] for found in words if len(found) > size]
    passages = [
        found for found in passages if len(loaded.tokenizer(" ".join(found))["input_ids"]) < loaded.window
    ]
    if len(passages) < FEWEST_DOCUMENTS:
        raise TaskError(
            f"{len(passages)} paragraphs of {path} have more than {size} words that fit the model's context, and tasks"
            f" need {FEWEST_DOCUMENTS};"
            " give more text, or tasks of your own with --tasks"
        )
    draw = random.Random(seed)
    draw.shuffle(passages)
    endings = [" " + " ".join(passage[CONTEXT_WORDS:size]) for passage in passages]
    cloze, last = [], []
    for own, passage in enumerate(passages[:documents]):
        others = draw.sample([ending for k, ending in enumerate(endings) if k != own], CHOICES - 1)
        answer = draw.randrange(CHOICES)
        choices = [*others[:answer], endings[own], *others[answer:]]
        cloze.append({"context": " ".join(passage[:CONTEXT_WORDS]), "choices": choices, "answer": answer})
        last.append({"context": " ".join(passage[:size]), "word": passage[size]})
    for name, rest, rows in (("cloze", CLOZE, cloze), ("last_word", LAST_WORD, last)):
        data = folder.resolve() / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=json.dumps(str(data)), rest=rest), encoding="utf-8"
        )
    return Tasks(folder, ("cloze", "last_word"))


def find_tasks(folder: Path, names: Sequence[str]) -> Tasks:
    """The named tasks of a folder, or all. Raises `TaskError` where there are none, or not these."""
    known = sorted(_manager(folder).all_tasks) if folder.is_dir() else []
    if not known:
        raise TaskError(
            f"{folder} has no task file of lm-evaluation-harness; give a folder with its YAML files"
        )
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TaskError(
                f"task {name!r} is not in {folder}; did you mean {near!r}? Known: {', '.join(known[:20])}"
            )
    return Tasks(folder, tuple(names) or tuple(known))


def task_scores(loaded: LoadedModel, tasks: Tasks, limit: int | None, batch: int) -> dict[str, Floats]:
    """(D,) of every task: each document's score under the model, which must be whole in memory.

    Raises `TaskError` for a model without a tokenizer, and for tasks that do not run or have no accuracy.
    """
    harness = _harness()
    _check_tokenizer(loaded)
    from lm_eval.models.huggingface import HFLM

    try:
        with _quietly():
            found = harness.simple_evaluate(
                model=HFLM(
                    pretrained=loaded.model,
                    tokenizer=loaded.tokenizer,
                    batch_size=batch,
                    max_length=loaded.window,
                    add_bos_token=bool(loaded.text_start),
                ),
                tasks=list(tasks.names),
                task_manager=_manager(tasks.folder),
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
    except Exception as error:  # the harness raises whatever a task file trips over
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise TaskError(
            f"lm-evaluation-harness cannot run {', '.join(tasks.names)} of {tasks.folder} ({reason});"
            f" check the task files, and that documents fit {loaded.window} tokens"
        ) from error
    return {name: _scores(name, samples) for name, samples in sorted(found["samples"].items())}


def _scores(task: str, samples: Sequence[dict[str, Any]]) -> Floats:
    metric = next((metric for metric in METRICS if samples and metric in samples[0]), None)
    if metric is None:
        raise TaskError(
            f"task {task} reports none of {', '.join(METRICS)}; choose tasks that are scored by document"
        )
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return np.array([float(sample[metric]) for sample in ordered])


def _check_tokenizer(loaded: LoadedModel) -> None:
    if loaded.tokenizer is None:
        raise TaskError(f"{loaded.ref.id} has no tokenizer to read tasks with")


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise TaskError(
            "lm-evaluation-harness is not installed, which runs the tasks; pip install 'bitrank[tasks]'"
        ) from error
    return lm_eval


def _manager(folder: Path) -> Any:
    _harness()
    from lm_eval.tasks import TaskManager

    with _quietly():
        return TaskManager(include_path=str(folder), include_defaults=False)


@contextlib.contextmanager
def _quietly() -> Any:
    """Without the harness's own bars and warnings."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
