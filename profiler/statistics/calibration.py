"""Calibration text: token windows from texts, or from the model itself.

Every window starts as the model's tokenizer starts a text (`LoadedModel.text_start`, usually one `<bos>`), because
that is the model that people run. The window's length counts these tokens.

Letters: N windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allocator.errors import BitrankError
from profiler.model.layers import LoadedModel, check_finite, read_text
from profiler.statistics.decoding import Step, appended_step, eager_step, recorded_step

LINES_TOKENIZED = 1000
OPENINGS = Path(__file__).with_name("openings.json")
"""Beginnings of texts by kind, written for this project."""
OPENED_SHARE = 0.75
"""Of sampled windows; what each share costs is in docs/predictions.md."""
MOST_AT_ONCE = 128
STEPS_REPORTED = 32
STEP_TOLERANCE = 0.01
"""Relative distance of logits beyond which a fast step is not trusted, and windows are drawn again without it."""
MOST_UNKNOWN = 0.5
"""A text with a larger share of unknown tokens is refused."""
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


class CalibrationError(BitrankError):
    """The calibration text is empty, too short, or cannot be tokenized."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def text_tokens(loaded: LoadedModel, paths: Path | Sequence[Path], count: int) -> Tensor:
    """int64 (N, T) windows of UTF-8 texts, as many of each, spread evenly over it; at most `count` tokens in all.

    A text too short for its share gives what it has. Raises `CalibrationError` for a text that cannot be read, is
    shorter than a window, or is not known to the tokenizer.
    """
    paths = [paths] if isinstance(paths, Path) else list(paths)
    shares = [windows(loaded, _read_text(loaded, path), count // len(paths), str(path)) for path in paths]
    return torch.cat(shares)


def _read_text(loaded: LoadedModel, path: Path) -> str:
    if loaded.tokenizer is None:
        raise CalibrationError(
            f"{loaded.ref.id} has no tokenizer, so {path} cannot be read; leave the text out"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path} as UTF-8 text ({error})") from error
    if not text.strip():
        raise CalibrationError(f"{path} is empty; give at least {loaded.window} tokens of text")
    return text


def windows(loaded: LoadedModel, text: str, count: int, source: str) -> Tensor:
    """int64 (N, T): `text` cut into windows, at most `count` tokens, taken evenly from start to end.

    Each is the tokenizer's start of a text, then T less that many tokens of the text.
    """
    tokens = tokenize(loaded.tokenizer, text)
    start = torch.tensor(loaded.text_start, dtype=torch.int64)
    taken = loaded.window - len(start)
    if len(tokens) < taken:
        start_tokens = f" beside {len(start)} that start it" if len(start) else ""
        raise CalibrationError(
            f"{source} has {len(tokens)} tokens; give at least {taken}, one window{start_tokens}"
        )
    check_known(loaded, tokens, source)
    if int(tokens.max()) >= loaded.vocabulary:
        raise CalibrationError(
            f"the tokenizer of {loaded.ref.id} makes token {int(tokens.max())}, but the model knows"
            f" {loaded.vocabulary}; copy the model's own tokenizer beside it"
        )
    tokens_Nt = tokens[: len(tokens) // taken * taken].view(-1, taken)
    wanted = min(len(tokens_Nt), max(1, count // loaded.window))
    chosen_Nt = tokens_Nt[torch.linspace(0, len(tokens_Nt) - 1, wanted).round().long()]
    return torch.cat((start.expand(wanted, -1), chosen_Nt), dim=1)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """int64 (T,) tokens of a text, taken at line ends in pieces: a tokenizer holds far more than the tokens."""
    tokens, piece = array("i"), list[str]()
    for line in text.splitlines(keepends=True):
        piece.append(line)
        if len(piece) == LINES_TOKENIZED:
            tokens.extend(tokenizer("".join(piece), add_special_tokens=False)["input_ids"])
            piece.clear()
    tokens.extend(tokenizer("".join(piece), add_special_tokens=False)["input_ids"])
    return torch.tensor(tokens, dtype=torch.int64)


def check_windows(tokens_NT: Tensor) -> None:
    """Raise `CalibrationError` unless there are windows to resample."""
    if len(tokens_NT) < 2:
        raise CalibrationError(
            f"the text to measure on is one window of {tokens_NT.shape[1]} tokens, and an interval needs two at least;"
            " give more text or more --tokens"
        )


def check_known(loaded: LoadedModel, tokens_n: Tensor, source: str) -> None:
    """Raise `CalibrationError` for a text that the tokenizer does not know: mostly unknown tokens, or one alone."""
    unknown = getattr(loaded.tokenizer, "unk_token_id", None)
    if unknown is not None:
        share = (tokens_n == unknown).float().mean().item()
        if share > MOST_UNKNOWN:
            raise CalibrationError(
                f"{share:.0%} of the tokens of {source} are unknown to the tokenizer of {loaded.ref.id};"
                " give text in a language and script that the model was trained on"
            )
    if (tokens_n == tokens_n[0]).all():
        raise CalibrationError(
            f"{source} is one token repeated {len(tokens_n)} times under the tokenizer of {loaded.ref.id};"
            " give text that the model was trained on"
        )


@torch.inference_mode()
def sample_tokens(
    loaded: LoadedModel,
    count: int,
    seed: int,
    progress: Progress = silent,
    opened_share: float = OPENED_SHARE,
) -> Tensor:
    """int64 (N, T) drawn from the model itself at temperature 1, the same for the same seed and machine.

    Windows start as the tokenizer starts a text. `opened_share` of them go on with an opening of `openings.json`, so
    that text of many kinds is seen; the others are the model's own from the start. Where the tokenizer adds no start,
    text is drawn after the configuration's `<bos>`, which is dropped; where that has none either, after a uniform
    token, which is kept.

    Raises `ModelError` where the model's logits are NaN or infinite.
    """
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    number = max(1, count // loaded.window)
    start, dropped = _start_of_samples(loaded)
    told = _told_tokens(loaded, start, number, seed, opened_share)
    at_once = _windows_at_once(loaded)
    batches = [
        _sampled(
            loaded,
            told[first : first + at_once],
            loaded.window + dropped,
            generator,
            _within(progress, first, number),
        )
        for first in range(0, number, at_once)
    ]
    return torch.cat(batches)[:, dropped:].contiguous()


def _within(progress: Progress, first: int, number: int) -> Callable[[float, int], None]:
    """Progress of a batch of windows that begins at `first`, given its share done and its size."""
    return lambda share, size: progress(
        "sampling calibration text", min(number, first + round(share * size)), number
    )


def _start_of_samples(loaded: LoadedModel) -> tuple[list[int], int]:
    """What every sampled window begins with, and how many of these tokens are dropped in the end.

    As the tokenizer starts a text; where it adds nothing, the configuration's `<bos>` stands before the text while it
    is drawn and is dropped.
    """
    if loaded.text_start:
        return list(loaded.text_start), 0
    bos = loaded.model.config.get_text_config().bos_token_id
    return ([bos], 1) if isinstance(bos, int) and 0 <= bos < loaded.vocabulary else ([], 0)


def _told_tokens(
    loaded: LoadedModel, start: list[int], number: int, seed: int, opened_share: float
) -> list[list[int]]:
    """What each window begins with: the start, and of some an opening, the kinds in turn."""
    draw = random.Random(seed)
    count = round(opened_share * number) if loaded.tokenizer is not None else 0
    told = []
    for text in drawn_openings(count, draw):
        tokens = [t for t in read_text(loaded.tokenizer, text) if t < loaded.vocabulary]
        told.append([*start, *tokens][: loaded.window // 2] or [draw.randrange(loaded.vocabulary)])
    told += [start or [draw.randrange(loaded.vocabulary)] for _ in range(number - count)]
    draw.shuffle(told)
    return told


def drawn_openings(count: int, draw: random.Random) -> list[str]:
    """Openings of all kinds in turn, each kind in an order of its own; again from its start where it is through."""
    kinds = json.loads(OPENINGS.read_text(encoding="utf-8"))
    orders = {kind: draw.sample(texts, len(texts)) for kind, texts in kinds.items()}
    names = list(orders)
    return [
        orders[names[k % len(names)]][k // len(names) % len(orders[names[k % len(names)]])]
        for k in range(count)
    ]


def _windows_at_once(loaded: LoadedModel) -> int:
    """Windows sampled together: each step reads all weights once, and the cache of keys and values is to fit."""
    output = loaded.model(torch.zeros(1, 1, dtype=torch.int64, device=loaded.device), use_cache=True)
    held = sum(
        tensor.numel()
        for layer in getattr(output.past_key_values, "layers", [])
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    )
    weights = sum(parameter.numel() for parameter in loaded.model.parameters())
    return max(8, min(MOST_AT_ONCE, 4 * weights // max(1, held * loaded.window)))


def _sampled(
    loaded: LoadedModel,
    told: list[list[int]],
    length: int,
    generator: torch.Generator,
    progress: Callable[[float, int], None],
) -> Tensor:
    """int64 (n, length) windows that begin as told; at every step each either reads what it is told or draws."""
    told_nT = torch.full((len(told), length), -1)
    for row, tokens in enumerate(told):
        told_nT[row, : len(tokens)] = torch.tensor(tokens)
    told_nT = told_nT.to(loaded.device)
    on_cuda = loaded.device.type == "cuda"
    fast = recorded_step(loaded.model, len(told), length) if on_cuda else appended_step(loaded.model, length)
    if fast is not None:
        state = generator.get_state()
        tokens_nT, seen = _drawn_windows(loaded, fast, told_nT, generator, progress)
        if _agrees(loaded, tokens_nT, seen):
            return tokens_nT.cpu()
        generator.set_state(state)
    return _drawn_windows(loaded, eager_step(loaded.model), told_nT, generator, progress)[0].cpu()


def _drawn_windows(
    loaded: LoadedModel,
    step: Step,
    told_nT: Tensor,
    generator: torch.Generator,
    progress: Callable[[float, int], None],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Windows (n, T) by steps of the model, and the first one's logits (V,) now and then, by their position."""
    (size, length), tokens_nT = told_nT.shape, told_nT.clone()
    seen: dict[int, Tensor] = {}
    finite = torch.ones((), dtype=torch.bool, device=loaded.device)
    for t in range(length - 1):
        logits_nV = step(tokens_nT[:, t : t + 1]).float()
        drawn_n, total_n = _drawn(logits_nV, generator)
        finite &= torch.isfinite(total_n).all()
        tokens_nT[:, t + 1] = torch.where(told_nT[:, t + 1] >= 0, told_nT[:, t + 1], drawn_n)
        if (t + 1) % STEPS_REPORTED == 0 or t + 2 == length:
            if not finite:
                check_finite(loaded.model, logits_nV.new_full((1,), torch.nan))
            seen[t] = logits_nV[0].clone()
            progress((t + 1) / (length - 1), size)
    return tokens_nT, seen


def _agrees(loaded: LoadedModel, tokens_nT: Tensor, seen: Mapping[int, Tensor]) -> bool:
    """Whether the first window's logits are those of the model run over the whole window at once.

    At several positions, since a mask that is wrong in the middle of a window may be right at its end.
    """
    expected_TV = loaded.model(tokens_nT[:1, :-1], use_cache=False).logits[0].float()
    return all(
        torch.linalg.vector_norm(logits_V - expected_TV[t])
        <= STEP_TOLERANCE * torch.linalg.vector_norm(expected_TV[t])
        for t, logits_V in seen.items()
    )


def _drawn(logits_nV: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A token of each row from its softmax, by inverting the cumulative sum, and the sums (n,)."""
    weight_nV = (logits_nV - logits_nV.amax(-1, keepdim=True)).exp_()
    cumulative_nV = weight_nV.double().cumsum(-1)
    total_n1 = cumulative_nV[:, -1:]
    uniform_n1 = torch.rand(
        len(logits_nV), 1, dtype=torch.float64, generator=generator, device=logits_nV.device
    )
    drawn_n1 = torch.searchsorted(cumulative_nV, uniform_n1 * total_n1, right=True)
    return drawn_n1[:, 0].clamp(max=logits_nV.shape[1] - 1), total_n1[:, 0]


def tokens_sha256(tokens_NT: Tensor) -> str:
    return hashlib.sha256(tokens_NT.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
