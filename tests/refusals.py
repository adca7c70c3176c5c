"""What every refused command has in common, and ways to damage what it is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import Outcome


def debris(folder: Path) -> list[str]:
    """Files and folders that only a command in progress may have."""
    names = (path for path in folder.rglob("*") if ".streams" not in path.parts)
    return [str(path) for path in names if path.suffix in (".tmp", ".activations")]


def assert_refused(outcome: Outcome, folder: Path, output: str, *said: str, code: int = 1) -> None:
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    missing = [words for words in said if words not in outcome.complaint]
    assert not missing, f"{missing} not in {outcome.complaint!r}"
    assert not (folder / output).exists()
    assert not debris(folder)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
