"""Metadata in safetensors files, in an order of its own: the same tensors give the same bytes."""

from __future__ import annotations

import json


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    """A safetensors file with `metadata` put in its header.

    safetensors itself writes metadata in random order, and the same plan must give the same bytes.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(data[8 : 8 + size]), separators=(",", ":"))
    text = header.encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
