"""Predicted against measured KL over random plans, and which sensitivity predicts best.

`python -m benchmarks.predictions PROFILE TEXT…` calibrates a profile on 40 random plans, measured on every other window
of the texts, measures 40 others on the windows between and prints the agreement before and after; then the same plans
under other scores, each with one gain:

    weight error        ‖ΔW‖²/‖W‖²
    H-weighted          tr(ΔW H ΔWᵀ)/tr(W H Wᵀ)
    isotropic Fisher    ½ mean(diag G) tr(ΔW H ΔWᵀ): gradients and inputs apart, H of all tokens evenly
    diagonal Fisher     ½ Σ_O G_OO (ΔW H ΔWᵀ)_OO, apart
    K-FAC               ½ tr(G ΔW H ΔWᵀ), apart
    one weight a token  ½ E[mean(g²) ‖ΔW x‖²]
    with shares of rows the same, every row times its share of E[g²]: what profiles use
    joint diagonal      ½ E[Σ_O g_O² (ΔW x)_O²]
    joint Fisher        ½ E[(g · ΔW x)²]
    noise slope         ‖ΔW‖²/‖W‖², times the KL that Gaussian noise of a tenth of the weights' norm costs (HIGGS)
    per-layer KL        the error, times the KL of this layer alone at 3 bits over its error there
    the profile         its own price, with the corrections of its check

It also measures pairs of layers together, against the sum of each alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from allocator.problem import Integers
from allocator.storage import KEEP, KEEP_BITS, Option
from api.cli.progress import progress
from benchmarks.pricing import gathered, prices
from profiler.documents.profile import Profile, load_profile
from profiler.evaluation.divergence import compare, stored_logits
from profiler.evaluation.plan_calibration import (
    RecalibrationSettings,
    agreement,
    predictions_by_class,
    random_choices,
    recalibrate,
)
from profiler.evaluation.plan_evaluation import BATCH_ON_CUDA, measure_trials, trial_of, trial_weight
from profiler.execution.block_pipeline import block_works
from profiler.model.checkpoint import find_model
from profiler.model.layers import LoadedModel, load_model, open_model
from profiler.statistics.calibration import text_tokens

PLANS = 40
PROBE = Option(3, 0, 64, 0)
NOISE = 0.1
JOINT_WINDOWS = 16
"""Windows of which every token's input and gradient are kept, for the scores that need them together."""
JOINT = {
    "token": "one weight a token",
    "rows": "with shares of rows",
    "diagonal": "joint diagonal",
    "Fisher": "joint Fisher",
}
Scores = dict[str, dict[tuple[str, Option], float]]


def fisher_moments(loaded: LoadedModel, tokens_NT: Tensor) -> dict[str, Tensor]:
    """G (O, O) of every layer per token, one label drawn from p."""
    total = {layer.name: torch.zeros(layer.rows, layer.rows, device=loaded.device) for layer in loaded.layers}
    generator = torch.Generator(device=loaded.device).manual_seed(0)
    handles = [_watch(loaded.model, name, total[name]) for name in total]
    for window_1T in tokens_NT.split(1):
        embedded = loaded.model.get_input_embeddings()(window_1T.to(loaded.device)).requires_grad_()
        logits_TV = loaded.model(inputs_embeds=embedded, use_cache=False).logits[0].float()
        p_TV = logits_TV.detach().softmax(-1)
        drawn_T1 = torch.multinomial(p_TV, 1, generator=generator)
        logits_TV.backward(p_TV.scatter_add(1, drawn_T1, torch.full_like(p_TV[:, :1], -1)))
    for handle in handles:
        handle.remove()
    return {name: moment / tokens_NT.numel() for name, moment in total.items()}


def _watch(model: nn.Module, name: str, total_OO: Tensor) -> torch.utils.hooks.RemovableHandle:
    def add(gradient: Tensor) -> None:
        by_token_nO = gradient.flatten(0, -2)
        total_OO.addmm_(by_token_nO.T, by_token_nO)

    return model.get_submodule(name).register_forward_hook(
        lambda module, arguments, output: output.register_hook(add) and None
    )


@torch.no_grad()
def layer_kls(
    loaded: LoadedModel, tokens_NT: Tensor, changes: Sequence[Mapping[str, Tensor]], folder: Path
) -> list[float]:
    """KL of the model with some layers' weights replaced, for every such change."""
    reference = stored_logits(loaded, tokens_NT, folder / "reference_of_layers.f32")
    found = []
    for change in changes:
        with loaded.replacing(lambda layer, change=change: change.get(layer.name, loaded.weight(layer))):
            found.append(compare(loaded.model, reference, tokens_NT, batch=BATCH_ON_CUDA)[:, 0].mean().item())
    return found


@torch.no_grad()
def scores(profile: Profile, device: str, wanted: dict[str, set[Option]], folder: Path) -> Scores:
    """Every score of every wanted option of every layer, decomposed already in `folder`; lower is better."""
    ref = find_model(profile.document.model.id)
    opened, tokens_NT = open_model(ref, device), profile.calibration_tokens()
    with torch.enable_grad():
        whole = load_model(ref, device)
        moments = fisher_moments(whole, tokens_NT)
        joint_NT = tokens_NT[:JOINT_WINDOWS]
        seen = gathered(whole, joint_NT)
    layer_of = {layer.name: layer for layer in opened.layers}
    found: Scores = {}
    share: dict[str, float] = {}

    def add(score: str, key: tuple[str, Option], value: float) -> None:
        found.setdefault(score, {})[key] = value

    for block in block_works(opened, tokens_NT, None, folder):
        for work in block.layers():
            w_OI, hessian_II = work.weight_OI, work.hessian_II
            signal, norm = ((w_OI @ hessian_II) * w_OI).sum().item(), w_OI.square().sum().item()
            for option in wanted[work.name]:
                key = (work.name, option)
                delta_OI = trial_weight(opened, layer_of[work.name], option, folder).to(w_OI.device) - w_OI
                output_OO = delta_OI @ hessian_II @ delta_OI.T
                trace = output_OO.trace().item()
                add("weight error", key, delta_OI.square().sum().item() / norm)
                add("H-weighted", key, trace / signal)
                moment_OO = moments[work.name]
                add("isotropic Fisher", key, moment_OO.diagonal().mean().item() * trace / 2)
                add("diagonal Fisher", key, (moment_OO.diagonal() @ output_OO.diagonal()).item() / 2)
                add("K-FAC", key, (moment_OO * output_OO).sum().item() / 2)
                joint = prices(delta_OI, *seen[work.name], joint_NT.numel()) if work.name in seen else {}
                for price, label in JOINT.items():
                    add(label, key, joint.get(price, 0.0))
            share[work.name] = norm
    generator = torch.Generator(device=opened.device).manual_seed(0)
    names = list(layer_of)
    noisy, probed = [], []
    for name in names:
        w_OI = opened.weight(layer_of[name])
        noise_OI = torch.randn(w_OI.shape, generator=generator, device=w_OI.device)
        noisy.append({name: w_OI + noise_OI * NOISE * w_OI.norm() / noise_OI.norm()})
        probed.append({name: trial_weight(opened, layer_of[name], PROBE, folder)})
    probe_NT = profile.probe_tokens()
    slope = layer_kls(opened, probe_NT, noisy, folder)
    alone = layer_kls(opened, probe_NT, probed, folder)
    for name, noise_kl, probe_kl in zip(names, slope, alone, strict=True):
        at_probe = found["H-weighted"][name, PROBE]
        for option in wanted[name]:
            add("noise slope", (name, option), found["weight error"][name, option] * noise_kl)
            add("per-layer KL", (name, option), found["H-weighted"][name, option] * probe_kl / at_probe)
    pairs = [*pairwise(range(len(names))), *((k, -1 - k) for k in range(len(names) // 2))]
    together = layer_kls(opened, probe_NT, [probed[a] | probed[b] for a, b in pairs], folder)
    ratios = [kl / (alone[a] + alone[b]) for kl, (a, b) in zip(together, pairs, strict=True)]
    everything = {name: value for change in probed for name, value in change.items()}
    whole_kl = layer_kls(opened, probe_NT, [everything], folder)[0]
    print(
        f"additivity at 3 bits, {len(pairs)} pairs of layers: together over the sum of each alone, median "
        f"{np.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}; all layers "
        f"{whole_kl / sum(alone):.3f}"
    )
    return found


def merit(predicted_P: np.ndarray, measured_P: np.ndarray) -> tuple[float, float]:
    """Spearman, and the median |log(predicted / measured)| after the best one gain."""
    log_ratio_P = np.log(predicted_P / measured_P)
    rank = float(spearmanr(predicted_P, measured_P).statistic)
    return rank, float(np.median(np.abs(log_ratio_P - np.median(log_ratio_P))))


def predicted(profile: Profile, choices: Sequence[Integers]) -> np.ndarray:
    layers = profile.menu.layers
    return np.array(
        [sum(layer.cost[k] for layer, k in zip(layers, choice, strict=True)) for choice in choices]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32_768, help="held-out tokens")
    parser.add_argument("--plans", type=int, default=PLANS)
    parser.add_argument("--seed", type=int, default=0, help="another draws other plans")
    parser.add_argument("--json", type=Path, help="write every plan's figures here")
    parser.add_argument("--work", type=Path, help="keep what was measured here, to resume")
    parser.add_argument("--no-scores", action="store_true", help="leave the other scores out")
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    with TemporaryDirectory() as temporary:
        report(profile, arguments, arguments.work or Path(temporary))


def report(profile: Profile, arguments: argparse.Namespace, work: Path) -> None:
    loaded = open_model(find_model(profile.document.model.id), arguments.device)
    settings = RecalibrationSettings(plans=arguments.plans, seed=arguments.seed)
    texts = [
        text_tokens(loaded, text, 2 * arguments.tokens // len(arguments.texts)) for text in arguments.texts
    ]
    tokens_NT = torch.cat([text_NT[1::2] for text_NT in texts])
    fitting_NT = torch.cat([text_NT[::2] for text_NT in texts])
    calibrated = recalibrate(loaded, profile, fitting_NT, work / "calibrated", settings, progress())
    choices = random_choices(
        profile.menu, RecalibrationSettings(plans=arguments.plans, seed=1000 + arguments.seed)
    )
    trials = [trial_of(profile.menu, choice) for choice in choices]
    probe_trial = {layer.name: PROBE for layer in profile.menu.layers}
    folder = work / "held-out"
    folder.mkdir(exist_ok=True)
    kl_PN = measure_trials(
        loaded, profile.calibration(), tokens_NT, [*trials, probe_trial], folder, progress()
    )[:, :, 0]
    measured_P = kl_PN.mean(dim=1).numpy()[:-1]
    before_P, after_P = predicted(profile, choices), predicted(calibrated, choices)
    low, high = calibrated.interval_factors
    inside = (measured_P >= after_P * low) & (measured_P <= after_P * high)
    found = agreement(measured_P, np.log(after_P / measured_P), np.log(before_P / measured_P), np.log(high))
    print(f"{profile.document.model.id}, {tokens_NT.numel()} held-out tokens, {len(choices)} plans")
    print(f"  on the {len(choices)} plans that calibrated it: {calibrated.document.agreement}")
    print(f"  on {len(choices)} other plans, held-out text: {found}")
    print(f"  inside the interval of ×{low:.3f} … ×{high:.3f}: {inside.mean():.1%}")
    document = {
        "model": profile.document.model.id,
        "choices": [choice.tolist() for choice in choices],
        "measured": kl_PN[:-1].tolist(),
        "before": before_P.tolist(),
        "after": after_P.tolist(),
        "plans": [plan.model_dump() for plan in calibrated.document.plans],
        "gain": calibrated.document.gain.classes,
        "classes": predictions_by_class(profile, choices)[1].tolist(),
        "fitted classes": predictions_by_class(profile, random_choices(profile.menu, settings))[1].tolist(),
        "intervals": [low, high],
    }
    if not arguments.no_scores:
        wanted = {name: {trial[name] for trial in [*trials, probe_trial]} - {KEEP} for name in probe_trial}
        table = scores(profile, arguments.device, wanted, folder)
        print("  score                              Spearman   median |log ratio| after one gain")
        for score, values in table.items():
            kept = [[(n, o) for n, o in trial.items() if o.bits != KEEP_BITS] for trial in trials]
            predicted_P = np.array([sum(values[key] for key in keys) for keys in kept])
            rank, spread = merit(predicted_P, measured_P)
            print(f"  {score:34} {rank:8.4f} {spread:12.4f}")
            document[score] = predicted_P.tolist()
        rank, spread = merit(before_P, measured_P)
        print(f"  {'the profile':34} {rank:8.4f} {spread:12.4f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
