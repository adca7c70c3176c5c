"""Moments: what every token's gradient and input say about a layer's errors.

What lives here: the weight of every token for every layer, H = Σ w_t x_t x_tᵀ / Σ w_t of every layer, and the inputs
of every block, kept on disk.

Letters: N windows, T tokens of a window, n tokens in all, d hidden size, O rows and I columns of a layer.

Let y = W x be a layer's output and g the gradient of −Σ log p(ŷ) by y at one token, ŷ drawn from the model's own
distribution. The second-order estimate of the KL divergence per token that a change ΔW causes is ½·E[(g·ΔW x)²]
(the layer's block of the Fisher information; Martens and Grosse, arXiv 1503.05671). With w_t = mean_O(g²) at token t
in place of g gᵀ it is ½·E[w_t·‖ΔW x_t‖²] = ½·E[w_t]·tr(ΔW H ΔWᵀ), for any ΔW. Rows differ too: an error of row o
counts s_o = E[g_o²] / mean_O E[g²] times as much, so that a price is ½·E[w_t]·Σ_O s_O (ΔW H ΔWᵀ)_OO. The H of an expert
has √w_t in place of w_t.

Gradient and input are taken together, token by token, because they are not independent: a few tokens, `<bos>` first
of all, have activations hundreds of times the others' and almost no gradient (massive activations, Sun et al., arXiv
2402.17762). The product of the two means prices what these tokens excite tens of times too high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compressor.cuda.scaled_half import tensor_cores
from compressor.nn.experts import ExpertList
from profiler.model.checkpoint import ModelError
from profiler.model.layers import Layer, LoadedModel, check_finite
from profiler.statistics.calibration import Progress, silent

TOKENS_DRAWN = 128
"""Positions whose next tokens are drawn at once; drawing holds several copies of their probabilities."""
EXPERT_POWER = 0.5
"""An expert sees few tokens, and few of these carry most of the weight, so that H under the weights themselves fits
these and no others (`docs/predictions.md`)."""
TOKENS = "tokens"
"""The tensor of a file of weights that says how many tokens they are of."""


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
            yield (
                first,
                self.read(first, count, device) if self.held is None else self.held[first : first + count],
            )

    def brought(self, device: torch.device) -> Tensor:
        """All of it, (N, T, d), on a device."""
        return self.read(0, self.shape[0], device)

    def read(self, first: int, count: int, device: torch.device) -> Tensor:
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


@dataclass(frozen=True, slots=True)
class TokenWeight:
    """w_t of one layer: float32 (m,), of the tokens (m,) that reached it, in rising order; None where all did."""

    weight_m: Tensor
    token_m: Tensor | None = None

    def on(self, device: torch.device) -> TokenWeight:
        return TokenWeight(
            self.weight_m.to(device), None if self.token_m is None else self.token_m.to(device)
        )

    def of(self, token_k: Tensor) -> Tensor:
        """float32 (k,) of these tokens; the mean of a token that had not reached the layer when weights were taken."""
        if self.token_m is None:
            return self.weight_m[token_k]
        place_k = torch.searchsorted(self.token_m, token_k).clamp(max=len(self.token_m) - 1)
        known_k = self.token_m[place_k] == token_k
        return torch.where(known_k, self.weight_m[place_k], self.weight_m.mean())


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """The weights of every layer that has any, by its name, over `tokens` tokens of calibration.

    A layer that no token reached, or whose inputs are not one row a token, has none.
    """

    by_layer: dict[str, TokenWeight]
    tokens: int
    rows: dict[str, Tensor]
    """Of every layer, each row's share of E[g²], float32 (O,), 1 on average."""

    def row_shares(self, layer: Layer, device: torch.device) -> Tensor:
        """float32 (O,): what an error of each row counts; 1 for a layer without any gradient."""
        return self.rows.get(layer.name, torch.ones(layer.rows)).to(device)

    def mean(self, name: str) -> float:
        """E[w_t] over all tokens of calibration; a token that does not reach a layer has no gradient there."""
        found = self.by_layer.get(name)
        return 0.0 if found is None else float(found.weight_m.double().sum()) / self.tokens

    def relative(self, names: Iterable[str]) -> dict[str, TokenWeight]:
        """Of these layers, each layer's weights over their mean, as its H takes them.

        An expert's are taken to the power `EXPERT_POWER`. A layer whose weights are all zero has none.
        """
        known = {name: self.by_layer[name] for name in names if name in self.by_layer}
        tempered = {
            name: found if found.token_m is None else replace(found, weight_m=found.weight_m**EXPERT_POWER)
            for name, found in known.items()
        }
        return {
            name: replace(found, weight_m=found.weight_m / found.weight_m.mean())
            for name, found in tempered.items()
            if found.weight_m.any()
        }

    def serialized(self) -> bytes:
        """A safetensors file: `<layer>` the weights, `<layer>.tokens` which tokens they are of, where not all, and
        `<layer>.rows` the rows' shares."""
        tensors = {name: w.weight_m.cpu() for name, w in self.by_layer.items()}
        tensors |= {f"{name}.rows": share_O.cpu() for name, share_O in self.rows.items()}
        tensors |= {
            f"{name}.tokens": w.token_m.int().cpu()
            for name, w in self.by_layer.items()
            if w.token_m is not None
        }
        return save(tensors | {TOKENS: torch.tensor(self.tokens)})

    @classmethod
    def load(cls, path: Path) -> TokenWeights:
        tensors = load_file(path)
        tokens = int(tensors.pop(TOKENS))
        routed = {name.removesuffix(".tokens"): t for name, t in tensors.items() if t.dtype == torch.int32}
        rows = {n.removesuffix(".rows"): t for n, t in tensors.items() if n.endswith(".rows")}
        return cls(
            {
                name: TokenWeight(t, routed[name].long() if name in routed else None)
                for name, t in tensors.items()
                if t.dtype == torch.float32 and not name.endswith(".rows")
            },
            tokens,
            rows,
        )


@contextmanager
def rows_to_tokens(
    loaded: LoadedModel, block: int
) -> Iterator[Callable[[Layer, Tensor, int], Tensor | None]]:
    """While open, tells which tokens (m,) of a batch of n the rows of a layer's input are, None where nobody knows.

    A router gives an expert some tokens; every other layer has one row a token.
    """
    routed: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            routed[name] = keywords["top_k_index"] if "top_k_index" in keywords else arguments[1]

        return hook

    def token_m(layer: Layer, x: Tensor, tokens: int) -> Tensor | None:
        experts, _, rest = layer.name.rpartition(".experts.")
        if f"{experts}.experts" in routed and rest:
            return torch.where(routed[f"{experts}.experts"] == int(rest.split(".")[0]))[0]
        rows = x.numel() // x.shape[-1]
        return torch.arange(tokens, device=x.device) if rows == tokens else None

    handles = [
        module.register_forward_pre_hook(note(f"{loaded.block_names[block]}.{name}"), with_kwargs=True)
        for name, module in loaded.blocks[block].named_modules()
        if isinstance(module, ExpertList)
    ]
    try:
        yield token_m
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Gathers the weights of every layer while batches run backwards."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.dense: dict[str, Tensor] = {}
        self.routed: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.rows: dict[str, Tensor] = {}

    def add(self, layer: Layer, token_m: Tensor, gradient_mO: Tensor, tokens_of_batch: int) -> None:
        square_mO = gradient_mO.float().square()
        weight_m, row_O = square_mO.mean(dim=1), square_mO.sum(dim=0)
        self.rows[layer.name] = self.rows[layer.name] + row_O if layer.name in self.rows else row_O
        if len(token_m) == tokens_of_batch and layer.name not in self.routed:
            zeros = torch.zeros(self.tokens, device=self.device)
            self.dense.setdefault(layer.name, zeros).index_add_(0, token_m, weight_m)
        else:
            self.routed.setdefault(layer.name, []).append((token_m, weight_m))

    def found(self, loaded: LoadedModel) -> TokenWeights:
        """Raises `ModelError` for gradients that are NaN or infinite."""
        by_layer: dict[str, TokenWeight] = {}
        for layer in loaded.layers:
            if layer.name in self.routed:
                parts = self.routed[layer.name]
                weight_n = self.dense.get(layer.name, torch.zeros(self.tokens, device=self.device))
                reached_n = weight_n > 0
                for token_m, weight_m in parts:
                    weight_n.index_add_(0, token_m, weight_m)
                    reached_n[token_m] = True
                by_layer[layer.name] = TokenWeight(weight_n[reached_n].cpu(), reached_n.nonzero()[:, 0].cpu())
            elif layer.name in self.dense:
                by_layer[layer.name] = TokenWeight(self.dense[layer.name].cpu())
        for name, found in by_layer.items():
            if not torch.isfinite(found.weight_m).all():
                raise ModelError(
                    f"the gradients of {name} are NaN or infinite, so no error of it can be priced;"
                    f" check the weights of {loaded.ref.id}, or calibrate on another text"
                )
        shares = {name: row_O / row_O.mean() for name, row_O in self.rows.items() if row_O.any()}
        return TokenWeights(by_layer, self.tokens, {name: share_O.cpu() for name, share_O in shares.items()})


def weigh_tokens(
    loaded: LoadedModel, tokens_NT: Tensor, seed: int, inputs: list[BlockInputs], progress: Progress = silent
) -> tuple[TokenWeights, BlockCalls]:
    """w_t of every layer and token; every block's inputs are written to `inputs`.

    How blocks were called comes with it, as from `block_calls`. Raises `ModelError` for gradients that are NaN or
    infinite.

    1. One forward pass without a graph keeps the input of every block.
    2. Block by block backwards, each recomputed from its input, so that only one block's activations are held.

    On CUDA products round to TF32, finer than the bfloat16 that models run in, as in `input_moments`: a later forward
    pass finds the same inputs to the bit.
    """
    generator = torch.Generator(device=loaded.device).manual_seed(seed)
    recorder = _Recorder(tokens_NT.numel(), loaded.device)
    calls: BlockCalls = {}
    batch = loaded.windows_per_batch
    for first in range(0, len(tokens_NT), batch):
        batch_NT = tokens_NT[first : first + batch].to(loaded.device)
        with tensor_cores():
            with captured_inputs(loaded) as seen:
                gradient = _output_gradient(loaded, batch_NT, generator)
            calls.setdefault(len(batch_NT), [seen[index][1] for index in range(len(loaded.block_names))])
            for index in reversed(range(len(loaded.block_names))):
                hidden, call = seen.pop(index)
                inputs[index].write(first, hidden)
                start = first * tokens_NT.shape[1]
                gradient = _block_gradient(loaded, index, call, hidden, gradient, recorder, start)
        progress("gradients", min(first + batch, len(tokens_NT)), len(tokens_NT))
    return recorder.found(loaded), calls


def gradient_means(loaded: LoadedModel, weights: TokenWeights) -> dict[str, float]:
    """E[w_t] of every layer, as `impute_unrouted_experts` completes it."""
    return impute_unrouted_experts(loaded, {layer.name: weights.mean(layer.name) for layer in loaded.layers})


def impute_unrouted_experts(loaded: LoadedModel, means: dict[str, float]) -> dict[str, float]:
    """Give a layer without any gradient (an expert never routed to) the mean of its like in the same block.

    It would otherwise cost nothing to destroy, and the next text may route to it. A layer that has no like stays at 0:
    nothing that it computes reaches the logits.
    """
    imputed = {}
    for layer in loaded.layers:
        like = [
            means[other.name]
            for other in loaded.layers_of(layer.block)
            if (other.rows, other.name.rpartition(".")[2]) == (layer.rows, layer.name.rpartition(".")[2])
        ]
        heard = [mean for mean in like if mean > 0]
        imputed[layer.name] = (
            sum(heard) / len(heard) if not means[layer.name] and heard else means[layer.name]
        )
    return imputed


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
    by_logits_nV.view_as(logits_NTV)[:, : loaded.first_scored] = 0
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
    recorder: _Recorder,
    start: int,
) -> Tensor:
    """Record the weights of the block's layers, of a batch that begins at token `start`; the gradient by its input."""
    tokens = hidden_NTd[..., 0].numel()

    with rows_to_tokens(loaded, index) as token_m:

        def watch(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                of_rows_m = token_m(layer, arguments[0], tokens)
                if of_rows_m is not None:
                    output.register_hook(
                        lambda g: recorder.add(layer, start + of_rows_m, g.flatten(0, -2), tokens)
                    )

            return hook

        handles = [
            loaded.model.get_submodule(layer.name).register_forward_hook(watch(layer))
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
    """H = Σ w_t x_t x_tᵀ / Σ w_t (I, I) of one layer, float32, over `count` tokens."""

    layer: Layer
    hessian_II: Tensor
    count: int


@torch.no_grad()
def input_moments(
    loaded: LoadedModel,
    index: int,
    calls: BlockCalls,
    inputs: BlockInputs,
    weights: TokenWeights | None,
    outputs: BlockInputs | None = None,
) -> list[InputMoment]:
    """H of every layer in a block, from the block's stored inputs; writes the block's outputs if asked.

    weights: w_t of these tokens. A layer that has none, or all zero, is weighted evenly; with `None`, every layer is.

    On CUDA √w·x is rounded to TF32, finer than the bfloat16 that models run in; so H is that of x as rounded, and
    positive semidefinite.

    A layer that no token reached (an expert never routed to) has H = I, so that its plain weight error counts.
    """
    layers = loaded.layers_of(index)
    usable = {} if weights is None else weights.relative(layer.name for layer in layers)
    usable = {name: weight.on(loaded.device) for name, weight in usable.items()}
    sums = {layer.name: torch.zeros(layer.columns, layer.columns, device=loaded.device) for layer in layers}
    totals = {layer.name: torch.zeros((), dtype=torch.float64, device=loaded.device) for layer in layers}
    counts = dict.fromkeys(sums, 0)
    place = {"start": 0, "tokens": 0}

    with rows_to_tokens(loaded, index) as token_m:

        def watch(layer: Layer) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                x_nI = arguments[0].flatten(0, -2).float()
                of_rows_m = token_m(layer, arguments[0], place["tokens"])
                if layer.name in usable and of_rows_m is not None:
                    weight_n = usable[layer.name].of(place["start"] + of_rows_m)
                else:
                    weight_n = x_nI.new_ones(len(x_nI))
                scaled_nI = x_nI * weight_n.sqrt()[:, None]
                with tensor_cores():
                    sums[layer.name].addmm_(scaled_nI.T, scaled_nI)
                totals[layer.name] += weight_n.double().sum()
                counts[layer.name] += len(x_nI)

            return hook

        handles = [
            loaded.model.get_submodule(layer.name).register_forward_pre_hook(watch(layer)) for layer in layers
        ]
        try:
            for first, hidden_NTd in inputs.batches(loaded.windows_per_batch, loaded.device):
                place["start"], place["tokens"] = first * inputs.shape[1], hidden_NTd[..., 0].numel()
                with tensor_cores():
                    output = calls[len(hidden_NTd)][index](loaded.blocks[index], hidden_NTd)
                if outputs is not None:
                    outputs.write(first, output)
        finally:
            for handle in handles:
                handle.remove()
    moments = []
    for layer in layers:
        if not counts[layer.name]:
            identity_II = torch.eye(layer.columns, device=loaded.device)
            moments.append(InputMoment(layer, identity_II, 0))
            continue
        hessian_II = sums[layer.name] / totals[layer.name].float().clamp(min=1e-30)
        moments.append(InputMoment(layer, hessian_II, counts[layer.name]))
    return moments
