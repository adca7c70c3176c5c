"""How the demo's texts were made: sampled from the demo model itself, temperature 1, fixed seeds.

Run `python -m profiler.demo.sample` to write calibration.txt and evaluation.txt again; on another machine or
version of torch the draws, and so the texts, may differ.
"""

from __future__ import annotations

from profiler.model.checkpoint import DEMO, DEMO_PATH, find_model
from profiler.model.layers import load_model
from profiler.statistics.calibration import sample_tokens

TEXTS = {"calibration": (80_000, 1), "evaluation": (40_000, 2)}
"""Tokens and seed of each text."""


def main() -> None:
    loaded = load_model(find_model(DEMO))
    for name, (count, seed) in TEXTS.items():
        tokens_NT = sample_tokens(loaded, count, seed)
        texts = [loaded.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens_NT]
        (DEMO_PATH / f"{name}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        print(f"{name}: {tokens_NT.numel()} tokens")


if __name__ == "__main__":
    main()
