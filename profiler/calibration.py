"""Calibration: tokens, and the statistics of every layer over them.

What lives here: token windows from a text or from the model itself, the second moment of every layer's input
(H = mean x xᵀ) and the second moment of every layer's output gradient, and the inputs of every block, kept on disk.

Letters: N windows, T tokens of a window, d hidden size, O rows and I columns of a layer.

The gradient is of −Σ log p(ŷ) with ŷ drawn from the model's own distribution, so its second moment G is the Fisher
information of the layer's output, and ½·tr(G ΔW H ΔWᵀ), summed over layers, is the second-order estimate of the KL
divergence per token (Martens and Grosse, K-FAC, arXiv 1503.05671, with both factors per layer). Only diag G is kept.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allocator.errors import BitrankError
from compressor.precision import tensor_cores
from profiler.layers import Layer, LoadedModel, check_finite

LINES_TOKENIZED = 1000
TOKENS_DRAWN = 128
"""Positions whose next tokens are drawn at once; drawing holds several copies of their probabilities."""
MOST_UNKNOWN = 0.5
"""A text with a larger share of unknown tokens is refused."""
Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""


class CalibrationError(BitrankError):
    """The calibration text is empty, too short, or cannot be tokenized."""


def silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def text_tokens(loaded: LoadedModel, path: Path, count: int) -> Tensor:
    """int64 (N, T) windows from a UTF-8 text, spread evenly over it; at most `count` tokens."""
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
    return windows(loaded, text, count, str(path))


def windows(loaded: LoadedModel, text: str, count: int, source: str) -> Tensor:
    """int64 (N, T): `text` cut into windows, at most `count` tokens, taken evenly from start to end."""
    tokens = tokenize(loaded.tokenizer, text)
    if len(tokens) < loaded.window:
        raise CalibrationError(
            f"{source} has {len(tokens)} tokens; give at least {loaded.window}, one window"
        )
    check_known(loaded, tokens, source)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    if int(tokens.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer of {loaded.ref.id} makes token {int(tokens.max())}, but the model knows {vocabulary};"
            " copy the model's own tokenizer beside it"
        )
    tokens_NT = tokens[: len(tokens) // loaded.window * loaded.window].view(-1, loaded.window)
    wanted = min(len(tokens_NT), max(1, count // loaded.window))
    return tokens_NT[torch.linspace(0, len(tokens_NT) - 1, wanted).round().long()]


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
def sample_tokens(loaded: LoadedModel, count: int, seed: int, progress: Progress = silent) -> Tensor:
    """int64 (N, T) drawn from the model itself at temperature 1, the same for the same seed and machine.

    Starts from the beginning-of-text token, or from a uniform one where the model has none.
    """
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    number = max(1, count // loaded.window)
    start = loaded.model.config.bos_token_id
    vocabulary = loaded.model.config.get_text_config().vocab_size
    batches = []
    for first in range(0, number, 32):
        size = min(32, number - first)
        if isinstance(start, int) and start < vocabulary:
            token_N1 = torch.full((size, 1), start, device=loaded.device)
        else:
            token_N1 = torch.randint(vocabulary, (size, 1), generator=generator, device=loaded.device)
        drawn, cache = [token_N1], None
        for _ in range(loaded.window - 1):
            output = loaded.model(token_N1, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            check_finite(loaded.model, output.logits)
            probability_NV = output.logits[:, -1].float().softmax(-1)
            token_N1 = torch.multinomial(probability_NV, 1, generator=generator)
            drawn.append(token_N1)
        batches.append(torch.cat(drawn, dim=1).cpu())
        progress("sampling calibration text", first + size, number)
    return torch.cat(batches)


def tokens_sha256(tokens_NT: Tensor) -> str:
    return hashlib.sha256(tokens_NT.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How the model calls a block, beside its hidden states: the same for every batch of one size."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: nn.Module, hidden_NTd: Tensor) -> Tensor:
        output = block(hidden_NTd, *self.arguments, **self.keywords)
        return output if isinstance(output, Tensor) else output[0]


class BlockInputs:
    """The input of one block for every calibration window, a float32 file (N, T, d) read batch by batch.

    Plain reads and writes: a full disk ends a memory map with SIGBUS instead of an error.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._window = shape[1] * shape[2]
        self.held: Tensor | None = None
        """All of it, where it is on the device already."""

    def write(self, first: int, hidden_NTd: Tensor) -> None:
        with self.path.open("r+b" if self.path.exists() else "wb") as file:
            file.seek(4 * first * self._window)
            file.write(hidden_NTd.float().cpu().contiguous().numpy().data)

    def batches(self, windows: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """The first window's index and the inputs of at most `windows` windows, in turn."""
        for first in range(0, self.shape[0], windows):
            count = min(windows, self.shape[0] - first)
            there = self.held is not None
            yield first, self.held[first : first + count] if there else self._read(first, count, device)

    def brought(self, device: torch.device) -> Tensor:
        """All of it, (N, T, d), on a device."""
        return self._read(0, self.shape[0], device)

    def _read(self, first: int, count: int, device: torch.device) -> Tensor:
        values = np.fromfile(self.path, np.float32, count * self._window, offset=4 * first * self._window)
        return torch.from_numpy(values).view(count, *self.shape[1:]).to(device)


@contextmanager
def captured_inputs(loaded: LoadedModel) -> Iterator[dict[int, tuple[Tensor, BlockCall]]]:
    """While open, every forward pass leaves each block's hidden states and call here."""
    seen: dict[int, tuple[Tensor, BlockCall]] = {}
    handles = []

    def capture(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            keywords = {k: v for k, v in keywords.items() if k not in ("past_key_values", "use_cache")}
            if arguments:
                hidden, rest = arguments[0], arguments[1:]
            else:
                hidden, rest = keywords.pop("hidden_states"), ()
            seen[index] = (hidden.detach(), BlockCall(rest, keywords))

        return hook

    for index, block in enumerate(loaded.blocks):
        handles.append(block.register_forward_pre_hook(capture(index), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


BlockCalls = dict[int, list[BlockCall]]
"""How each block is called, by batch size."""


def block_calls(loaded: LoadedModel, tokens_NT: Tensor) -> BlockCalls:
    """Of full batches, then of a short last one."""
    calls: BlockCalls = {}
    batch = loaded.windows_per_batch
    sizes = {min(batch, len(tokens_NT)), len(tokens_NT) % batch} - {0}
    for size in sizes:
        with captured_inputs(loaded) as seen, torch.no_grad():
            loaded.model(tokens_NT[:size].to(loaded.device), use_cache=False)
        calls[size] = [seen[index][1] for index in range(len(loaded.block_names))]
    return calls


def gradient_moments(
    loaded: LoadedModel, tokens_NT: Tensor, seed: int, inputs: list[BlockInputs], progress: Progress = silent
) -> tuple[dict[str, Tensor], BlockCalls]:
    """diag G of every layer, float32 (O,) per token of calibration; every block's inputs are written to `inputs`.

    How blocks were called comes with it, as from `block_calls`.

    One forward pass without a graph, then block by block backwards, each recomputed from its input, so that only
    one block's activations are held.
    """
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    total = {
        layer.name: torch.zeros(layer.rows, dtype=torch.float64, device=loaded.device)
        for layer in loaded.layers
    }
    calls: BlockCalls = {}
    batch = loaded.windows_per_batch
    for first in range(0, len(tokens_NT), batch):
        batch_NT = tokens_NT[first : first + batch].to(loaded.device)
        with captured_inputs(loaded) as seen:
            gradient = _output_gradient(loaded, batch_NT, generator)
        calls.setdefault(len(batch_NT), [seen[index][1] for index in range(len(loaded.block_names))])
        for index in reversed(range(len(loaded.block_names))):
            hidden, call = seen.pop(index)
            inputs[index].write(first, hidden)
            gradient = _block_gradient(loaded, index, call, hidden, gradient, total)
        progress("gradients", min(first + batch, len(tokens_NT)), len(tokens_NT))
    moments = {name: (moment / tokens_NT.numel()).float() for name, moment in total.items()}
    return _lend_to_silent(loaded, moments), calls


def _lend_to_silent(loaded: LoadedModel, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a layer that no token reached (an expert never routed to) the mean of its like in the same block.

    It would otherwise cost nothing to destroy, and the next text may route to it.
    """
    lent = {}
    for layer in loaded.layers:
        like = [
            moments[other.name]
            for other in loaded.layers_of(layer.block)
            if (other.rows, other.name.rpartition(".")[2]) == (layer.rows, layer.name.rpartition(".")[2])
        ]
        heard = [moment for moment in like if moment.any()]
        silent_layer = not moments[layer.name].any() and heard
        lent[layer.name] = torch.stack(heard).mean(dim=0) if silent_layer else moments[layer.name]
    return lent


def _output_gradient(loaded: LoadedModel, batch_NT: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of −Σ log p(ŷ) by the last block's output; by the logits it is p − onehot(ŷ), made in their place."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, arguments: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).detach().requires_grad_()
        leaves.append(hidden)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = loaded.blocks[-1].register_forward_hook(cut)
    try:
        logits_NTV = loaded.model(batch_NT, use_cache=False).logits.float()
    finally:
        handle.remove()
    check_finite(loaded.model, logits_NTV)
    by_logits_nV = logits_NTV.detach().flatten(0, 1)
    by_logits_nV.sub_(by_logits_nV.amax(-1, keepdim=True)).exp_()
    by_logits_nV.div_(by_logits_nV.sum(-1, keepdim=True))
    for piece_mV in by_logits_nV.split(TOKENS_DRAWN):
        drawn_m1 = torch.multinomial(piece_mV, 1, generator=generator)
        piece_mV.scatter_add_(1, drawn_m1, torch.full_like(drawn_m1, -1, dtype=piece_mV.dtype))
    logits_NTV.backward(by_logits_nV.view_as(logits_NTV))
    gradient = leaves[0].grad
    assert gradient is not None
    return gradient


def _block_gradient(
    loaded: LoadedModel,
    index: int,
    call: BlockCall,
    hidden_NTd: Tensor,
    gradient_NTd: Tensor,
    total: dict[str, Tensor],
) -> Tensor:
    """Add the squared output gradients of the block's layers to `total`; the gradient by the block's input."""

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            total[name] += gradient.flatten(0, -2).square().sum(dim=0)

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            output.register_hook(add)

        return hook

    handles = [
        loaded.model.get_submodule(layer.name).register_forward_hook(watch(layer.name))
        for layer in loaded.layers_of(index)
    ]
    hidden_NTd = hidden_NTd.requires_grad_()
    try:
        call(loaded.blocks[index], hidden_NTd).backward(gradient_NTd)
    finally:
        for handle in handles:
            handle.remove()
    assert hidden_NTd.grad is not None
    return hidden_NTd.grad


@dataclass(frozen=True, slots=True)
class InputMoment:
    """H = mean x xᵀ (I, I), float32, over `count` tokens, and the layers that share this input."""

    layers: tuple[Layer, ...]
    hessian_II: Tensor
    count: int


@torch.no_grad()
def input_moments(
    loaded: LoadedModel,
    index: int,
    calls: BlockCalls,
    inputs: BlockInputs,
    outputs: BlockInputs | None = None,
) -> list[InputMoment]:
    """H of every distinct input in a block, from the block's stored inputs; writes the block's outputs if asked.

    On CUDA x is rounded to TF32, finer than the bfloat16 that models run in; so H is that of x as rounded, and
    positive semidefinite.

    A layer that no token reached (an expert never routed to) has H = I, so that its plain weight error counts.
    """
    layers = loaded.layers_of(index)
    leader: dict[str, str] = {}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    live: dict[int, tuple[Tensor, str]] = {}

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            known = live.get(id(x))
            first = known[1] if known is not None and known[0] is x else layer.name
            live[id(x)] = (x, first)
            if leader.setdefault(layer.name, first) != layer.name:
                return
            x_nI = x.flatten(0, -2).float()
            if layer.name not in sums:
                sums[layer.name] = torch.zeros(layer.columns, layer.columns, device=x.device)
                counts[layer.name] = 0
            with tensor_cores():
                sums[layer.name].addmm_(x_nI.T, x_nI)
            counts[layer.name] += len(x_nI)

        return hook

    handles = []
    for layer in layers:
        handles.append(loaded.model.get_submodule(layer.name).register_forward_pre_hook(watch(layer)))
    try:
        for first, hidden_NTd in inputs.batches(loaded.windows_per_batch, loaded.device):
            live.clear()
            with tensor_cores():
                output = calls[len(hidden_NTd)][index](loaded.blocks[index], hidden_NTd)
            if outputs is not None:
                outputs.write(first, output)
    finally:
        for handle in handles:
            handle.remove()
    moments = []
    for layer in layers:
        if leader.get(layer.name, layer.name) != layer.name:
            continue
        members = tuple(other for other in layers if leader.get(other.name, other.name) == layer.name)
        count = counts.get(layer.name, 0)
        identity_II = torch.eye(layer.columns, device=loaded.device)
        moments.append(InputMoment(members, sums[layer.name] / count if count else identity_II, count))
    return moments
