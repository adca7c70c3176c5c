"""Recovery: the scales of a compressed model trained to bring its predictions back to the original's.

What lives here: the trainable layer, the training loop with its state on disk, and the checkpoint with the new scales.
Codes and zero points stay, so a recovered checkpoint takes the bytes that it took. Where models and tokens come from
is the caller's.

Letters: N windows, T tokens of a window, O rows, I columns, G groups of a row, g columns of a group, r rank.

Every scale becomes s·(1 + δ), with δ trained by Adam under a cosine schedule to minimise KL(original ‖ compressed) in
nats per token, and is rounded to bfloat16 on the way; gradients pass the rounding straight through (Bengio et al.,
arXiv 1308.3432). A bfloat16 factor F becomes F + rms(F)·δ. The order of windows follows from seed and epoch alone.
The last windows are held back: where training does not bring them nearer, the checkpoint stays what it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from allocator.atomic import write_atomically
from allocator.storage import KEEP_BITS
from compressor.checkpoint_writer import AUXILIARY, check_output, put_in_place
from compressor.hadamard import rotated, rotation
from compressor.metadata import with_metadata
from compressor.nn.linear import CompressedLinear, left_name, matrix_names, through_left
from compressor.packing import unpack
from profiler.evaluation.divergence import divergence
from profiler.statistics.calibration import Progress

STATE = "recovery.safetensors"
SAVED_EVERY = 25
WARM_UP = 10
BETAS = (0.9, 0.99)
HELD_BACK = 16
"""One window of so many is not trained on."""


@dataclass(frozen=True, slots=True)
class RecoverySettings:
    """Steps of Adam, windows of a step, and the learning rate of δ, a relative change of a scale."""

    steps: int = 300
    windows: int = 4
    learning_rate: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Recovered:
    """KL (nats/token) on the windows held back, before training and after it."""

    before_kl: float
    after_kl: float

    @property
    def helped(self) -> bool:
        """Whether the checkpoint has the trained scales; it has its own where they do not bring it nearer."""
        return self.after_kl < self.before_kl


class TrainableMatrix(nn.Module):
    """A quantized matrix whose scales are s·(1 + δ); δ float32 (O, G), zero at first."""

    level_OGg: Tensor
    start_OG: Tensor

    def __init__(self, layer: CompressedLinear, name: str, columns: int) -> None:
        super().__init__()
        bits, group_size = layer.grid_of(name)
        codes, scale, _ = matrix_names(name)
        code_OI = unpack(getattr(layer, codes), bits, columns).short()
        start_OG = getattr(layer, scale).detach().float()
        padding = start_OG.shape[1] * group_size - columns
        code_OGg = F.pad(code_OI, (0, padding)).unflatten(1, (-1, group_size))
        self.columns = columns
        self.register_buffer("level_OGg", code_OGg - layer.zero_points(name)[..., None].short())
        self.register_buffer("start_OG", start_OG)
        self.delta_OG = nn.Parameter(torch.zeros_like(start_OG))

    def scale(self) -> Tensor:
        """(O, G) float32, on the grid of bfloat16."""
        scale_OG = self.start_OG * (1 + self.delta_OG)
        return scale_OG + (scale_OG.bfloat16().float() - scale_OG).detach()

    def forward(self) -> Tensor:
        return (self.level_OGg * self.scale()[..., None]).flatten(1)[:, : self.columns]


class TrainableFactor(nn.Module):
    """A bfloat16 factor F + rms(F)·δ; δ float32 (r, ·), zero at first."""

    start_rI: Tensor

    def __init__(self, factor_rI: Tensor) -> None:
        super().__init__()
        self.register_buffer("start_rI", factor_rI.detach().float())
        self.delta_rI = nn.Parameter(torch.zeros_like(self.start_rI))

    def scale(self) -> Tensor:
        """The factor itself, on the grid of bfloat16."""
        factor_rI = self.start_rI + self.start_rI.square().mean().sqrt() * self.delta_rI
        return factor_rI + (factor_rI.bfloat16().float() - factor_rI).detach()

    def forward(self) -> Tensor:
        return self.scale()


class TrainableLinear(nn.Module):
    """A `CompressedLinear` with trainable scales: y = x (Q + L·R)ᵀ + bias."""

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__()
        option = layer.option
        self.left = left_name(option) if option.rank else None
        self.heads, self.bias = option.heads, layer.bias
        widths = {"weight": layer.in_features} if option.bits else {}
        if self.left:
            widths |= {self.left: layer.out_features // option.heads, "right": layer.in_features}
        self.matrices = nn.ModuleDict(
            {
                name: TrainableFactor(getattr(layer, name))
                if option.factor_bits == KEEP_BITS and name in (self.left, "right")
                else TrainableMatrix(layer, name, width)
                for name, width in widths.items()
            }
        )
        self.has_grid, self.is_rotated = option.bits > 0, option.rotated

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        if self.is_rotated:
            x = rotated(x, rotation(x.shape[-1], x.device, x.dtype))
        if self.has_grid:
            parts.append(F.linear(x, self.matrices["weight"]()))
        if self.left:
            hidden = F.linear(x, self.matrices["right"]())
            parts.append(through_left(hidden, self.matrices[self.left](), self.heads))
        output = sum(parts[1:], parts[0])
        return output if self.bias is None else output + self.bias

    def stored(self) -> dict[str, Tensor]:
        """The tensors that training changed, by their names within the layer."""
        tensors = {}
        for name, matrix in self.matrices.items():
            assert isinstance(matrix, TrainableFactor | TrainableMatrix)
            stored_name = name if isinstance(matrix, TrainableFactor) else matrix_names(name)[1]
            tensors[stored_name] = matrix.scale().detach().bfloat16()
        return tensors


def make_trainable(model: PreTrainedModel) -> dict[str, TrainableLinear]:
    """Swap every compressed layer of a float32 model for a trainable one, and freeze all else."""
    model.requires_grad_(False)
    layers = {
        name: TrainableLinear(module)
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear) and module is not model.get_output_embeddings()
    }
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def recover(
    student: PreTrainedModel,
    teacher: Callable[[Tensor], Tensor],
    tokens_NT: Tensor,
    first_scored: int,
    source: Path,
    output: Path,
    settings: RecoverySettings,
    progress: Progress,
    request: str,
) -> Recovered:
    """Train the scales of `student`, the model of the checkpoint in `source`, and write the checkpoint with them, or as
    it was where they did not help.

    teacher: logits (N, T, vocabulary) of the original for windows (N, T). first_scored: the first position of a window
    whose logits count (`LoadedModel.first_scored`). request: what the result depends on beside
    the settings, so that an interrupted run of the same is resumed and of another is not. Raises `WorkError` when the
    output is occupied.
    """
    check_output(output)
    partial = output.with_name(f"{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    layers = make_trainable(student)
    request = json.dumps([request, asdict(settings)])
    train_NT, held_NT = held_back(tokens_NT)
    before_kl = kl_nats(student, teacher, held_NT, first_scored)
    train(student, teacher, train_NT, first_scored, partial / STATE, settings, progress, request)
    found = Recovered(before_kl, kl_nats(student, teacher, held_NT, first_scored))
    write_checkpoint(source, partial, layers if found.helped else {})
    (partial / STATE).unlink(missing_ok=True)
    put_in_place(partial, output)
    return found


def held_back(tokens_NT: Tensor) -> tuple[Tensor, Tensor]:
    """The windows to train on, and the last ones to judge by; a single window serves for both."""
    count = max(1, len(tokens_NT) // HELD_BACK)
    return (tokens_NT[:-count] if len(tokens_NT) > count else tokens_NT), tokens_NT[-count:]


@torch.no_grad()
def kl_nats(
    student: nn.Module, teacher: Callable[[Tensor], Tensor], tokens_NT: Tensor, first_scored: int
) -> float:
    """KL(original ‖ student), nats per token, over the positions from `first_scored` on."""
    found = [
        _divergence(student, teacher, window_1T, first_scored).item() for window_1T in tokens_NT.split(1)
    ]
    return sum(found) / len(found)


def _divergence(
    student: nn.Module, teacher: Callable[[Tensor], Tensor], window_NT: Tensor, first_scored: int
) -> Tensor:
    log_p_NTV = teacher(window_NT)[:, first_scored:].float().log_softmax(-1)
    log_q_NTV = student(window_NT, use_cache=False).logits[:, first_scored:].float().log_softmax(-1)
    return divergence(log_p_NTV, log_q_NTV).mean()


def train(
    student: nn.Module,
    teacher: Callable[[Tensor], Tensor],
    tokens_NT: Tensor,
    first_scored: int,
    state: Path,
    settings: RecoverySettings,
    progress: Progress,
    request: str,
) -> None:
    """Adam on every δ; `state` holds what an interrupted run of the same request goes on from."""
    deltas = {name: delta for name, delta in student.named_parameters() if delta.requires_grad}
    optimizer = torch.optim.Adam(deltas.values(), lr=settings.learning_rate, betas=BETAS)
    done = _load(state, request, deltas, optimizer)
    for step in range(done, settings.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        window_NT = tokens_NT[chosen_windows(step, len(tokens_NT), settings)]
        loss = _divergence(student, teacher, window_NT, first_scored)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % SAVED_EVERY == 0 and step + 1 < settings.steps:
            _save(state, request, step + 1, deltas, optimizer)
        progress("recovering", step + 1, settings.steps)


def learning_rate(step: int, settings: RecoverySettings) -> float:
    """A warm-up, then half a cosine down to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * min(1.0, (step + 1) / WARM_UP) * cosine


def chosen_windows(step: int, count: int, settings: RecoverySettings) -> Tensor:
    """The windows of a step: each epoch takes every window once, in an order of its own; the last few may be left."""
    windows = min(settings.windows, count)
    epoch, batch = divmod(step, count // windows)
    generator = torch.Generator().manual_seed(settings.seed + epoch)
    return torch.randperm(count, generator=generator)[batch * windows :][:windows]


def _save(
    state: Path, request: str, step: int, deltas: dict[str, nn.Parameter], optimizer: torch.optim.Adam
) -> None:
    tensors = {f"{name}.delta": delta.detach() for name, delta in deltas.items()}
    for name, delta in deltas.items():
        moments = optimizer.state[delta]
        tensors |= {f"{name}.{key}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
    write_atomically(state, with_metadata(save(tensors), {"request": request, "step": str(step)}))


def _load(state: Path, request: str, deltas: dict[str, nn.Parameter], optimizer: torch.optim.Adam) -> int:
    """Steps done, and δ and the moments after them; 0 where there is no state of this request."""
    if not state.exists():
        return 0
    with safe_open(state, framework="pt") as file:
        metadata = file.metadata()
    if metadata["request"] != request:
        return 0
    tensors, step = load_file(state), int(metadata["step"])
    for name, delta in deltas.items():
        delta.data.copy_(tensors[f"{name}.delta"])
        moments = {key: tensors[f"{name}.{key}"].to(delta.device) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[delta] = {"step": torch.tensor(float(step)), **moments}
    return step


def write_checkpoint(source: Path, partial: Path, layers: dict[str, TrainableLinear]) -> None:
    """The files of `source`, with the tensors that training changed."""
    changed = {
        f"{name}.{tensor}": value
        for name, layer in layers.items()
        for tensor, value in layer.stored().items()
    }
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            metadata = dict(sorted((shard.metadata() or {}).items()))
        tensors = {name: changed.get(name, value).cpu() for name, value in load_file(file).items()}
        write_atomically(partial / file.name, with_metadata(save(tensors), metadata))
    for file in _others(source):
        write_atomically(partial / file.name, file.read_bytes())


def _others(source: Path) -> Iterator[Path]:
    for pattern in AUXILIARY:
        yield from sorted(source.glob(pattern))
