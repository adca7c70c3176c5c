"""The page of a comparison of strategies: one HTML file with its chart. The drawing is in `web/studies.js`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from allocator.atomic import write_atomically
from api.report import SCRIPTS, render_page


def write_comparison(path: Path, document: dict[str, Any]) -> None:
    """Write what `bitrank compare --json` prints, and the page beside it, each whole or not at all."""
    title = f"bitrank compare: {document['model']['id']}"
    page = render_page("study.html", title, (*SCRIPTS, "studies.js"), {"kind": "compare", "study": document})
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(path.with_suffix(".html"), page.encode())
