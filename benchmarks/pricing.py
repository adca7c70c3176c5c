"""Which price of a layer's error predicts what it costs, and which Hessian to round under: the decision, measured.

`python -m benchmarks.pricing MODEL CALIBRATION TEXT… [--device cuda]`. Inputs x and output gradients g of every token
and layer are kept, so it takes a GPU for anything but small models. Prices of an error ΔW:

    apart     ½ mean(diag E[g gᵀ]) · tr(ΔW E[x xᵀ] ΔWᵀ): the means of both moments multiplied
    token     ½ E[mean_O(g²) · ‖ΔW x‖²]: one weight a token
    rows      the same, each row times its own share of E[g²]
    groups    the same with a weight for each of four groups of rows
    diagonal  ½ E[Σ_O g_O² (ΔW x)_O²]
    Fisher    ½ E[(g·ΔW x)²], the layer's block of the Fisher information

Hessians: `plain`, `token` (w_t = mean_O g²), `shared` (one w_t for q, k and v, and for gate and up), `root` (√w_t),
`cap16` (w_t at most 16 times its mean), `groups` (four groups of rows, each with its own). `--damping` tries further
dampings under `token`.

1. Every layer alone at 3 bits: each price against the KL that it causes.
2. All layers at 2, 3 and 4 bits, and allocated by each price at 3 and 4 bits a weight, under every Hessian.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

import compressor.quantize.gptq as gptq
from allocator.storage import Option
from compressor.lowrank.decompose import decompose
from compressor.lowrank.hessian import Curvature
from profiler.model.checkpoint import find_model
from profiler.model.layers import Layer, LoadedModel, load_model
from profiler.statistics.calibration import text_tokens

BITS = (2, 3, 4, 5, 6)
GROUPS = 4
Seen = dict[str, tuple[Tensor, Tensor]]
"""Inputs (n, I) and output gradients (n, O) of the tokens that reached a layer."""


def gathered(loaded: LoadedModel, tokens_NT: Tensor) -> Seen:
    """x and g of every layer, one label drawn from the model a position."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(layer: Layer) -> Callable[..., None]:
        def note(module: object, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x_nI = arguments[0].detach().flatten(0, -2)
            output.register_hook(lambda g: seen.setdefault(layer.name, []).append((x_nI, g.flatten(0, -2))))

        return note

    handles = [
        loaded.model.get_submodule(layer.name).register_forward_hook(hook(layer)) for layer in loaded.layers
    ]
    embedding = loaded.model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda m, a, output: output.requires_grad_()))
    torch.manual_seed(0)
    for batch_NT in tokens_NT.split(loaded.windows_per_batch):
        logits_NTV = loaded.model(batch_NT.to(loaded.device), use_cache=False).logits.float()
        p_nV = logits_NTV.detach().flatten(0, 1).softmax(-1)
        drawn_n1 = torch.cat([torch.multinomial(part, 1) for part in p_nV.split(128)])
        p_nV.scatter_add_(1, drawn_n1, torch.full_like(drawn_n1, -1, dtype=p_nV.dtype))
        logits_NTV.backward(p_nV.view_as(logits_NTV))
        del logits_NTV, p_nV
    for handle in handles:
        handle.remove()
    found: Seen = {}
    for name in list(seen):
        parts = seen.pop(name)
        found[name] = torch.cat([x for x, _ in parts]), torch.cat([g for _, g in parts])
    return found


def prices(delta_OI: Tensor, x_nI: Tensor, g_nO: Tensor, tokens: int) -> dict[str, float]:
    y_nO = x_nI @ delta_OI.T
    g2_nO, y2_nO = g_nO.square(), y_nO.square()
    w_n, share = g2_nO.mean(dim=1), 0.5 / tokens
    by_row_O = (w_n[:, None] * y2_nO).sum(dim=0)
    row_share_O = g2_nO.sum(dim=0) / w_n.sum().clamp(min=1e-30)
    rows = [
        slice(k, k + math.ceil(len(by_row_O) / GROUPS))
        for k in range(0, len(by_row_O), math.ceil(len(by_row_O) / GROUPS))
    ]
    return {
        "apart": share * w_n.mean().item() * y2_nO.sum().item(),
        "token": share * by_row_O.sum().item(),
        "rows": share * (row_share_O * by_row_O).sum().item(),
        "groups": share * sum((g2_nO[:, r].mean(dim=1) * y2_nO[:, r].sum(dim=1)).sum().item() for r in rows),
        "diagonal": share * (g2_nO * y2_nO).sum().item(),
        "Fisher": share * (g_nO * y_nO).sum(dim=1).square().sum().item(),
    }


def weights_of(kind: str, layer: Layer, seen: Seen, siblings: Sequence[str]) -> Tensor:
    """w (n,) of every token that reached a layer."""
    x_nI, g_nO = seen[layer.name]
    if kind == "plain":
        return x_nI.new_ones(len(x_nI))
    if kind == "shared":
        means = [seen[name][1].square().mean(dim=1) for name in siblings]
        return sum((w_n / w_n.mean() for w_n in means[1:]), means[0] / means[0].mean())
    w_n = g_nO.square().mean(dim=1)
    if not w_n.any():
        return torch.ones_like(w_n)
    w_n = w_n / w_n.mean()
    if kind == "root":
        return w_n.sqrt()
    if kind.startswith("cap"):
        return w_n.clamp(max=float(kind.removeprefix("cap")))
    return w_n


def hessian(x_nI: Tensor, w_n: Tensor) -> Tensor:
    scaled_nI = x_nI * (w_n / w_n.sum()).sqrt()[:, None]
    return scaled_nI.T @ scaled_nI


def quantized(
    loaded: LoadedModel, layer: Layer, kind: str, seen: Seen, siblings: Sequence[str]
) -> list[Tensor]:
    """W of a layer at every width of `BITS`."""
    w_OI, options = loaded.weight(layer), [Option(bits, 0, 64, 0) for bits in BITS]
    x_nI, g_nO = seen[layer.name]
    found: dict[int, Tensor] = {}
    if kind == "groups":
        size = math.ceil(layer.rows / GROUPS / 32) * 32
        parts = []
        for r in range(0, layer.rows, size):
            w_n = g_nO[:, r : r + size].square().mean(dim=1)
            curvature = Curvature.of(hessian(x_nI, w_n if w_n.any() else torch.ones_like(w_n)))
            part_OI = w_OI[r : r + size]
            parts.append({p: d.dense() for p, d in decompose([part_OI] * len(options), curvature, options)})
        return [torch.cat([part[p] for part in parts]) for p in range(len(options))]
    curvature = Curvature.of(hessian(x_nI, weights_of(kind, layer, seen, siblings)))
    for p, decomposition in decompose([w_OI] * len(options), curvature, options):
        found[p] = decomposition.dense()
    return [found[p] for p in range(len(options))]


class Judge:
    """KL of the model under other weights, on every text."""

    def __init__(self, loaded: LoadedModel, texts: Mapping[str, Tensor]) -> None:
        self.loaded, self.texts = loaded, texts
        self.original = {layer.name: loaded.weight(layer).clone() for layer in loaded.layers}
        with torch.no_grad():
            self.log_p = {
                name: [self._logits(w) for w in tokens_NT.split(1)] for name, tokens_NT in texts.items()
            }

    def _logits(self, window_1T: Tensor) -> Tensor:
        logits = self.loaded.model(window_1T.to(self.loaded.device), use_cache=False).logits
        return logits[0, :-1].float().log_softmax(-1)

    @torch.no_grad()
    def kl(self, changes: Mapping[str, Tensor], texts: Sequence[str] | None = None) -> dict[str, float]:
        self._put(changes)
        found = {}
        for name in texts or self.texts:
            parts = []
            for window_1T, log_p in zip(self.texts[name].split(1), self.log_p[name], strict=True):
                log_q = self._logits(window_1T)
                parts.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            found[name] = torch.stack(parts).mean().item()
        self._put({name: self.original[name] for name in changes})
        return found

    def _put(self, changes: Mapping[str, Tensor]) -> None:
        for layer in self.loaded.layers:
            if layer.name in changes:
                weight = self.loaded.model.get_submodule(layer.name).weight
                weight.copy_(changes[layer.name].T if layer.transposed else changes[layer.name])


def allocated(cost: Mapping[str, Sequence[float]], size: Mapping[str, int], bits: float) -> dict[str, int]:
    """Index of the width of every layer that a price for a bit buys, at `bits` a weight in all."""
    low, high = 1e-20, 1e6
    for _ in range(100):
        price = math.sqrt(low * high)
        choice = {
            n: min(range(len(BITS)), key=lambda k: c[k] + price * BITS[k] * size[n]) for n, c in cost.items()
        }
        spent = sum(BITS[k] * size[n] for n, k in choice.items())
        low, high = (price, high) if spent > bits * sum(size.values()) else (low, price)
    return {n: min(range(len(BITS)), key=lambda k: c[k] + high * BITS[k] * size[n]) for n, c in cost.items()}


def calibration_tokens(loaded: LoadedModel, path: Path, windows: int) -> Tensor:
    """Windows of a text, or the tensor `tokens` of a safetensors file."""
    if path.suffix == ".safetensors":
        return load_file(path)["tokens"].long()[:windows]
    return text_tokens(loaded, path, windows * loaded.window)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--eval-windows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hessians", default="plain,token,shared,root,cap16,groups")
    parser.add_argument("--damping", default="", help="further dampings, tried under `token`")
    parser.add_argument("--prices", default="apart,token,rows,groups,diagonal,Fisher")
    parser.add_argument("--not-alone", action="store_true", help="skip the first part")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    loaded = load_model(find_model(arguments.model), arguments.device)
    calibration_NT = calibration_tokens(loaded, arguments.calibration, arguments.windows)
    seen = gathered(loaded, calibration_NT)
    tokens = calibration_NT.numel()
    layers = [layer for layer in loaded.layers if layer.name in seen]
    judge = Judge(
        loaded,
        {t.stem: text_tokens(loaded, t, arguments.eval_windows * loaded.window) for t in arguments.texts},
    )
    size = {layer.name: layer.weights for layer in layers}
    say = lambda text: print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)  # noqa: E731
    say(f"{len(layers)} layers, {tokens} tokens")
    report: dict[str, object] = {}
    runs = [(kind, gptq.DAMPING) for kind in arguments.hessians.split(",")]
    runs += [("token", float(d)) for d in arguments.damping.split(",") if d]
    for kind, damping in runs:
        gptq.inverse_factor.__defaults__ = gptq.damped_diagonal.__defaults__ = (damping,)
        label = kind if damping == gptq.DAMPING else f"{kind} damped {damping}"
        weights, cost = {}, {}
        try:
            for layer in layers:
                siblings = (
                    [
                        o.name
                        for o in layers
                        if o.block == layer.block
                        and o.columns == layer.columns
                        and len(seen[o.name][0]) == len(seen[layer.name][0])
                        and torch.equal(seen[o.name][0][:2], seen[layer.name][0][:2])
                    ]
                    if kind == "shared"
                    else []
                )
                weights[layer.name] = quantized(loaded, layer, kind, seen, siblings)
                cost[layer.name] = [
                    prices(q - judge.original[layer.name], *seen[layer.name], tokens)
                    for q in weights[layer.name]
                ]
        except Exception as error:  # a damping too small
            say(f"{label}: {error}")
            continue
        say(f"{label}: quantized")
        if label in ("plain", "token") and not arguments.not_alone:
            first = next(iter(judge.texts))
            kl_L = [judge.kl({y.name: weights[y.name][1]}, [first])[first] for y in layers]
            for price in next(iter(cost.values()))[0]:
                p_L = [cost[y.name][1][price] for y in layers]
                log_L = torch.tensor(
                    [math.log(max(p, 1e-12) / max(k, 1e-9)) for p, k in zip(p_L, kl_L, strict=True)]
                )
                row = {
                    "spread": log_L.std().item(),
                    "spearman": float(spearmanr(p_L, kl_L).statistic),
                    "sum_ratio": sum(p_L) / sum(kl_L),
                }
                report[f"{label}, alone, {price}"] = row
                say(
                    f"{label}, alone at 3 bits, {price}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items())
                )
        for k in range(len(BITS))[:3]:
            found = judge.kl({n: w[k] for n, w in weights.items()})
            predicted = {p: sum(c[k][p] for c in cost.values()) for p in next(iter(cost.values()))[0]}
            report[f"{label}, uniform {BITS[k]}"] = {"kl": found, "predicted": predicted}
            say(f"{label}, uniform {BITS[k]}: {_short(found)}; predicted {_short(predicted)}")
        for price in arguments.prices.split(",") if label in ("plain", "token") else ("token",):
            for bits in (3, 4):
                choice = allocated({n: [c[price] for c in costs] for n, costs in cost.items()}, size, bits)
                found = judge.kl({n: weights[n][k] for n, k in choice.items()})
                predicted_sum = sum(cost[n][k][price] for n, k in choice.items())
                report[f"{label}, by {price} at {bits}"] = {"kl": found, "predicted": predicted_sum}
                say(f"{label}, by {price} at {bits}: {_short(found)}; predicted {predicted_sum:.4f}")
        del weights, cost
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1))


def _short(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


if __name__ == "__main__":
    main()
