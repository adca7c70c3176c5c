"""The writer's thread: in order, nothing after a failure, and the failure is the caller's."""

from __future__ import annotations

import time

import pytest

from profiler.execution.writer import WAITING, Writer


def test_tasks_run_in_their_order_and_are_done_when_it_is_left() -> None:
    done: list[int] = []
    with Writer() as writer:
        for number in range(3 * WAITING):
            writer.submit(lambda number=number: (time.sleep(0.01), done.append(number)))
    assert done == list(range(3 * WAITING))


def fail() -> None:
    raise OSError("no space left")


def test_after_a_failure_nothing_is_written_and_the_failure_is_raised() -> None:
    done: list[str] = []
    with pytest.raises(OSError, match="no space left"), Writer() as writer:
        writer.submit(lambda: done.append("before"))
        writer.submit(fail)
        for _ in range(2 * WAITING):
            writer.submit(lambda: done.append("after"))
            time.sleep(0.01)
    assert done == ["before"]


def test_a_failure_of_the_last_task_is_raised_on_leaving() -> None:
    with pytest.raises(OSError, match="no space left"), Writer() as writer:
        writer.submit(fail)


def test_an_exception_inside_drops_what_had_not_begun() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt), Writer() as writer:
        writer.submit(lambda: (time.sleep(0.2), done.append("begun")))
        time.sleep(0.05)
        writer.submit(lambda: done.append("dropped"))
        raise KeyboardInterrupt
    assert done == ["begun"]
