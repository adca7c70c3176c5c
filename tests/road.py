"""A small random model and where everything that the road makes of it lies."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from profiler.documents.profile import load_profile
from profiler.model.checkpoint import DEMO_PATH

GRID = ("--bits", "2,3,4", "--ranks", "0,4", "--group-sizes", "32,64", "--tokens", "1024")


@dataclass(frozen=True)
class Road:
    """The small model and everything the road makes of it. Read-only: tests copy what they change."""

    folder: Path

    @property
    def model(self) -> Path:
        """A Llama of two blocks with random weights, windows of 64 tokens, and the demo's tokenizer."""
        return self.folder / "model"

    @property
    def text(self) -> Path:
        """Enough text for the grid's 1024 tokens."""
        return self.folder / "calibration.txt"

    @property
    def profile(self) -> Path:
        return self.folder / "profile"

    @property
    def remarks(self) -> str:
        """What every command that plans from the profile says of it on stderr."""
        return "".join(f"bitrank: {sentence}\n" for sentence in load_profile(self.profile).warnings)

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def profiling(self, output: Path | str, model: Path | str | None = None) -> tuple[str | Path, ...]:
        """The arguments that made `profile`."""
        return ("profile", model or self.model, "-o", output, "--calibration", self.text, *GRID)


def write_model(path: Path, vocabulary: int = 8192) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_PATH / name, path / name)
