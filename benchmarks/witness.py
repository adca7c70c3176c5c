"""Whoever watches the layer files of every run: a file of a finished block that changes is a block run twice."""

from __future__ import annotations

import threading
from pathlib import Path

LAYERS_PER_BLOCK = 7


class Witness:
    """Looks a hundred times a second until `close`; `rewritten` names files of a finished block that changed."""

    def __init__(self, data_dir: Path) -> None:
        self._runs = data_dir / "runs"
        self._first: dict[str, tuple[int, int]] = {}
        self._finished: set[str] = set()
        self.rewritten: list[str] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    @property
    def finished_blocks(self) -> int:
        return len(self._finished)

    @property
    def blocks_run_twice(self) -> int:
        return len({key.rsplit("/", 1)[0] for key in self.rewritten})

    def _watch(self) -> None:
        while not self._closing.wait(0.01):
            for folder in self._runs.glob("*/profile/.work/layers"):
                self._look(folder)

    def _look(self, folder: Path) -> None:
        blocks: dict[str, dict[str, tuple[int, int]]] = {}
        for file in folder.glob("[!.]*.json"):
            try:
                status = file.stat()
            except FileNotFoundError:
                continue
            block = f"{folder.parent.parent.parent.name}/{'.'.join(file.name.split('.')[:3])}"
            blocks.setdefault(block, {})[file.name] = (status.st_ino, status.st_mtime_ns)
        for block, layers in blocks.items():
            for name, seen in layers.items():
                key = f"{block}/{name}"
                if block in self._finished and self._first[key] != seen:
                    self.rewritten.append(key)
                self._first[key] = seen
            if len(layers) == LAYERS_PER_BLOCK:
                self._finished.add(block)
