"""The page people look at, and the API's documentation as a page; both work offline."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, HTMLResponse, Response

WEB = Path(__file__).parents[2] / "web"
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;
color-scheme:light dark}
summary{cursor:pointer;padding:.3rem 0}code{font-family:ui-monospace,monospace}dd{margin-left:1.5rem}
summary code{font-weight:600}pre{white-space:pre-wrap}"""
router = APIRouter(include_in_schema=False)


@router.get("/")
async def read_page() -> Response:
    return FileResponse(WEB / "index.html", headers={"Cache-Control": "no-cache"})


@router.get("/favicon.ico")
async def read_icon() -> Response:
    return FileResponse(WEB / "icon.svg", media_type="image/svg+xml")


@router.get("/docs")
async def read_documentation(request: Request) -> Response:
    document = request.app.openapi()
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>bitrank API</title><style>{STYLE}</style>'
        f"<h1>bitrank API {html.escape(document['info']['version'])}</h1>"
        f"<p>{html.escape(document['info']['description'])}</p>"
        f'<p>The whole description: <a href="openapi.json">openapi.json</a>.</p>{operations}</html>'
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<dt><code>{html.escape(p['name'])}</code> ({p['in']})</dt><dd>{html.escape(p.get('description', ''))}</dd>"
        for p in operation.get("parameters", ())
    )
    answers = "".join(
        f"<dt><code>{status}</code></dt><dd>{html.escape(answer['description'])}</dd>"
        for status, answer in sorted(operation["responses"].items())
    )
    return (
        f"<details><summary><code>{method.upper()} {html.escape(path)}</code> "
        f"{html.escape(operation.get('summary', ''))}</summary><p>{html.escape(operation.get('description', ''))}</p>"
        f"<dl>{parameters}</dl><h4>Answers</h4><dl>{answers}</dl></details>"
    )
