"""What a command says on stderr beside errors: how far it is, and remarks on what it works from."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable


class ProgressLine:
    """Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere.

    Also keeps how long each stage took, in `seconds`.
    """

    def __init__(self) -> None:
        from time import monotonic

        self._clock: Callable[[], float] = monotonic
        self._stage = ""
        self._entered = self._shown = monotonic()
        self._first = 0
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage != self._stage:
            self.seconds[stage] = 0.0
            self._first = done if stage == "sweep" else 0
            since = self._entered if not self._stage else now
            self._stage, self._entered, self._shown = stage, since, 0.0
        self.seconds[stage] = now - self._entered
        terminal = sys.stderr.isatty()
        if done < total and now - self._shown < (0.1 if terminal else 10):
            return
        self._shown = now
        print(
            self._line(now, done, total), file=sys.stderr, end=self._end(terminal, done == total), flush=True
        )

    def _line(self, now: float, done: int, total: int) -> str:
        steps = done - self._first
        left = (now - self._entered) / steps * (total - done) if steps > 0 else 0.0
        filled = "█" * (24 * done // max(1, total))
        return f"{self._stage:28} {filled:24} {done}/{total}  {now - self._entered:.0f} s, {left:.0f} s left "

    def _end(self, terminal: bool, complete: bool) -> str:
        return "\n" if complete or not terminal else "\r"


def remark(sentences: Iterable[str]) -> None:
    """Each on a line of its own."""
    for sentence in sentences:
        print(f"bitrank: {sentence}", file=sys.stderr)


def progress() -> ProgressLine:
    _quiet_libraries()
    return ProgressLine()


def _quiet_libraries() -> None:
    """By its environment variables, so that transformers, which takes seconds, is imported when it is needed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
