"""The use-cases, each once: what the CLI and the service both call.

What lives here: profile, plan, frontier, curves, compress, evaluate, as plain functions from typed inputs to typed
results. Heavy packages are imported inside the functions that need them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from allocator.budget import parse_budget
from allocator.constraints.rules import Constraints
from allocator.errors import BitrankError, BudgetSyntaxError, InfeasibleError, PlanError, StrategyError
from allocator.plan import Plan, PlanBudget, budget_bytes, describe_bytes
from allocator.strategies.recipes import Sensitivities
from allocator.strategies.strategies import ByRecipe, Optimal, choice_bytes, choose, parse_strategy
from allocator.targets import check_compressible, check_fused, check_tables, target_named

if TYPE_CHECKING:
    from torch import Tensor

    from allocator.planner import Planner
    from allocator.problem import Menu, Solution
    from allocator.strategies.policy import Energies, Policy
    from allocator.strategies.strategies import Rule
    from profiler.documents.profile import Profile
    from profiler.evaluation.divergence import Fidelity
    from profiler.evaluation.prompts import SamplePair
    from profiler.model.layers import LoadedModel
    from profiler.recovery.recovery import Recovered, RecoverySettings
    from profiler.statistics.calibration import Progress
    from profiler.sweep.run import ProfileSettings

CONSTRAINED_SECONDS = 5.0
"""Longest search under constraints before the best plan found is returned with its gap."""


def home() -> Path:
    """Where bitrank remembers finished profiles: $BITRANK_HOME, or a folder of the user's cache."""
    return Path(os.environ.get("BITRANK_HOME", Path.home() / ".cache" / "bitrank"))


def profile_model(model: str, output: Path, settings: ProfileSettings, progress: Progress) -> Profile:
    """Measure a model into the directory `output`, or resume doing so."""
    from profiler.model.checkpoint import find_model
    from profiler.sweep.run import build_profile

    profile = build_profile(find_model(model), output, settings, progress)
    remember(profile)
    return profile


def remember(profile: Profile) -> None:
    """Note where a profile lies, so that `compress` finds it by the digest in a plan.

    A convenience: where the note cannot be written, `compress` asks for --profile.
    """
    from allocator.atomic import write_atomically

    folder = home() / "profiles"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / profile.sha256, str(profile.path.resolve()).encode())


def find_profile(plan: Plan, plan_path: Path, given: Path | None) -> Profile:
    """The profile a plan was made from: the one given, one beside the plan, or one remembered."""
    from profiler.documents.profile import load_profile

    if given is not None:
        profile = load_profile(given)
        if profile.sha256 != plan.profile_sha256:
            raise PlanError(
                f"{plan_path} was not made from the profile {given}; give the one it was made from"
            )
        return profile
    noted = home() / "profiles" / plan.profile_sha256
    beside = plan_path.resolve().parent
    folders = [beside, *sorted(p.parent for p in beside.glob("*/profile.json"))]
    if noted.exists():
        folders.append(Path(noted.read_text()))
    for folder in folders:
        file = folder / "profile.json"
        if file.exists() and sha256(file.read_bytes()).hexdigest() == plan.profile_sha256:
            return load_profile(folder)
    raise PlanError(
        f"the profile that {plan_path} was made from (sha256 {plan.profile_sha256[:12]}…) is not to be found;"
        " say where it is with --profile"
    )


def plan_budget(
    profile: Profile,
    budget: str | None,
    strategy: str = "optimal",
    constraints: Constraints | None = None,
    target: str | None = None,
    policy: Policy | None = None,
) -> Plan:
    """Plan one budget for a target runtime. A uniform strategy, a recipe or a policy has a size and needs no budget.

    Tables are planned where the profile's menu has them. Raises what `check_planning` raises, `ConstraintError`,
    `InfeasibleError` and `BudgetAboveOriginalError`.
    """
    planner, required = planner_for(profile, target), constraints
    menu = planner.menu
    rules = () if policy is None else policy.resolved(menu.without_tables(), energies_of(profile, policy))
    check_planning(budget, strategy, constraints is not None, target, rules)
    parsed = parse_strategy(strategy, rules)
    if isinstance(parsed, ByRecipe) and parsed.recipe.needs_sensitivities:
        parsed = replace(parsed, sensitivities=sensitivities_of(profile))
    if target is not None:
        required = target_named(target).constrained(constraints or Constraints())
    if budget is None:
        total = choice_bytes(menu, choose(parsed, menu, menu.original_bytes))
        budget = f"{total}B"
    total = budget_bytes(menu, parse_budget(budget), required)
    bound = optimum(planner, total, required)
    choice = bound.choice if isinstance(parsed, Optimal) else choose(parsed, menu, total)
    taken = choice_bytes(menu, choice)
    if taken > total:
        raise InfeasibleError(
            f"strategy {strategy} takes {taken:,} bytes, but the budget {budget} is {total:,};"
            f" raise it to {describe_bytes(menu, taken)}",
            taken,
        )
    if target is not None:
        check_fused(menu, choice, target, strategy)
    written = PlanBudget(text=budget, bytes=total)
    made = planner.plan(choice, budget=written, bound=bound, strategy=strategy, target=target)
    return with_warnings(made, profile)


def with_warnings(plan: Plan, profile: Profile) -> Plan:
    """The plan with what its profile warns of, and what it measured of a plan near this size."""
    warnings = profile.warnings if plan.verification is None else profile.warnings_once_verified
    checked = profile.described_check(plan.total_bytes)
    return plan.model_copy(update={"warnings": warnings, "checked": checked})


def planner_for(profile: Profile, target: str | None) -> Planner:
    """The plans that a target executes."""
    return profile.planner if target is None else replace(profile.planner, menu=menu_for(profile, target))


def menu_for(profile: Profile, target: str | None) -> Menu:
    """What can be planned for a target: every measured option, or those that it executes at its own sizes.

    Raises `TargetError` for tables that the target holds at 16 bits only.
    """
    if target is None:
        return profile.menu
    check_tables(profile.menu, target)
    return target_named(target).restricted(profile.menu)


def energies_of(profile: Profile, policy: Policy) -> Energies:
    """The energy that every profiled rank of every layer holds, where a rule asks for it; raises `StrategyError`."""
    if not policy.needs_energies:
        return {}
    from profiler.documents.sidecar import SpectrumDocument

    document = SpectrumDocument.beside(profile.path, profile.document.model.weights_sha256)
    if document is None:
        raise StrategyError(f"{profile.path} has no spectra to take an energy from; profile the model again")
    return {
        layer.name: {
            option.rank: document.layers[layer.name].spectrum.energy_at(option.rank)
            for option in layer.options
        }
        for layer in profile.menu.without_tables().layers
    }


def sensitivities_of(profile: Profile) -> Sensitivities | None:
    """What compressing each block alone costs, as the profile measured it; None where it did not."""
    from profiler.documents.sidecar import FidelityDocument

    found = FidelityDocument.beside(profile.path, profile.document.model.weights_sha256)
    if found is None:
        return None
    return Sensitivities(
        tuple(block.probe_kl.mean for block in found.blocks), tuple(block.tier for block in found.blocks)
    )


def check_planning(
    budget: str | None,
    strategy: str,
    constrained: bool,
    target: str | None,
    rules: tuple[Rule, ...] = (),
) -> None:
    """What can be wrong with a request to plan before any profile is looked at.

    Raises `BudgetSyntaxError`, `StrategyError`, `TargetError`.
    """
    parsed = parse_strategy(strategy, rules)
    if budget is not None:
        parse_budget(budget)
    elif isinstance(parsed, Optimal):
        raise BudgetSyntaxError("a budget is missing; give --budget like 700MiB, 25% or 3.25bpw")
    if constrained and not isinstance(parsed, Optimal):
        raise StrategyError("constraints go with the strategy optimal; leave one of them out")
    if target is not None:
        target_named(target)


def optimum(planner: Planner, total_bytes: int, constraints: Constraints | None) -> Solution:
    """The best choice, with its certificate, for a whole checkpoint of `total_bytes`."""
    if constraints is None:
        return planner.optimum(total_bytes)
    from allocator.allocation import allocate

    return allocate(planner.menu, total_bytes, constraints, time_limit_seconds=CONSTRAINED_SECONDS)


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A size and the least predicted KL (nats/token) at it."""

    total_bytes: int
    bits_per_weight: float
    kl_nats: float


def bits_per_weight(menu: Menu, total_bytes: int) -> float:
    return 8 * (total_bytes - menu.kept_bytes) / menu.compressible_weights


def frontier_points(profile: Profile) -> list[FrontierPoint]:
    """Every breakpoint of the frontier, smallest budget first."""
    from allocator.solver.frontier import frontier

    menu = profile.menu
    found = frontier(menu.problem(menu.original_bytes))
    sizes = (found.total_bytes + menu.kept_bytes).tolist()
    return [
        FrontierPoint(s, bits_per_weight(menu, s), kl)
        for s, kl in zip(sizes, found.cost.tolist(), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class UniformPoint:
    """A uniform setting that every layer of the menu offers, and its predicted KL."""

    strategy: str
    total_bytes: int
    bits_per_weight: float
    kl_nats: float


def uniform_points(profile: Profile) -> list[UniformPoint]:
    """Uniform settings at group 64 and rank 0, as far as the profile measured them."""
    from allocator.errors import AllocationError
    from allocator.strategies.strategies import Uniform, choice_cost

    menu, points = profile.menu, []
    for bits in (2, 3, 4, 5, 6, 8):
        try:
            choice = choose(Uniform(bits), menu, menu.original_bytes)
        except AllocationError:
            continue
        size = choice_bytes(menu, choice)
        points.append(
            UniformPoint(f"uniform:{bits}", size, bits_per_weight(menu, size), choice_cost(menu, choice))
        )
    return points


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measured option of a layer, and the fitted error beside it; None where the fit is not of such options."""

    layer: str
    bits: int
    rank: int
    group_size: int
    factor_bits: int
    heads: int
    rotated: bool
    error: float
    fitted_error: float | None
    kl_nats: float


def curve_points(profile: Profile, pattern: str = "*") -> list[CurvePoint]:
    """Measured points of the layers whose name matches a glob; raises `BitrankError` when none does."""
    names = [name for name in profile.document.layers if fnmatchcase(name, pattern)]
    if not names:
        some = ", ".join(list(profile.document.layers)[:3])
        raise BitrankError(f"no layer matches {pattern!r}; names look like {some}")
    points = []
    for name in names:
        fit = profile.document.layers[name].fit
        for m in (m for m in profile.measurements[name] if not m.half_width):
            option, cost = m.option, m.error * profile.price(name, m.option.bits)
            on_fit = option.bits and not option.rotated
            fitted = fit.error(option.bits, option.rank, option.group_size) if on_fit else None
            points.append(
                CurvePoint(name, **asdict(option), error=m.error, fitted_error=fitted, kl_nats=cost)
            )
    return points


def compress_plan(
    plan_path: Path,
    output: Path,
    progress: Progress,
    profile_path: Path | None = None,
    device: str = "cpu",
    model: str | None = None,
) -> Plan:
    """Carry out plan.json into a checkpoint directory; resumes an interrupted run of the same plan.

    `model` says where the original is now, if not where it was when it was profiled. The plan comes back with what its
    profile warns of.
    """
    from allocator.plan import load_plan
    from compressor.checkpoint_writer import check_output

    plan = load_plan(plan_path)
    check_output(output)
    profile = find_profile(plan, plan_path, profile_path)
    execute(plan, profile, output, progress, device, model)
    return with_warnings(plan, profile)


def execute(
    plan: Plan,
    profile: Profile,
    output: Path,
    progress: Progress,
    device: str = "cpu",
    model: str | None = None,
) -> None:
    """Carry out a plan made from `profile`. Raises `PlanError` when the model's weights are not the plan's."""
    import torch

    from compressor.warmup import warm_up
    from profiler.model.checkpoint import check_device

    check_device(device)
    warm_up(torch.device(device))
    # Tokens come from the profile, so no text is read.
    loaded = original_of(plan, device, model, reads_text=False)
    from api.services.kvcache import files_of_cache
    from compressor.checkpoint_writer import compress
    from profiler.execution.block_pipeline import block_works

    beside = files_of_cache(plan, profile)
    kept = {name: tensor.cpu() for name, tensor in loaded.kept_tensors()}
    output = output.resolve()
    with scratch(output.with_name(f".{output.name}.activations")) as folder:
        blocks = block_works(loaded, *profile.calibration(), folder)
        compress(plan, blocks, kept, loaded.ref.path, output, progress, len(loaded.block_names), beside)


def original_of(plan: Plan, device: str, model: str | None, reads_text: bool = True) -> LoadedModel:
    """The model a plan is for; reads_text as in `open_model`.

    Raises `PlanError` when the weights found are others, `TargetError`.
    """
    from profiler.model.checkpoint import find_model, weights_sha256

    check_compressible(plan.target)
    ref = find_model(model or plan.model.id)
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(weights_sha256, ref)
        from profiler.model.layers import open_model  # takes seconds, in which the weights are read

        loaded = open_model(ref, device, reads_text)
        if digest.result() != plan.model.weights_sha256:
            raise PlanError(
                f"the weights of {ref.id} are not those the plan was made for; profile this model and plan again"
            )
    return loaded


def verify_plan(
    plan: Plan, profile: Profile, progress: Progress, device: str = "cpu", constrained: bool = False
) -> Plan:
    """The plan measured beside uniform at the same bytes, on windows held back from the statistics.

    An optimal plan gives way to a neighbour that measures better, unless a target or constraints bind it. Whether it
    lost to uniform is in its `verification`. Raises `PlanError`, `TargetError`.
    """
    from tempfile import TemporaryDirectory

    from profiler.evaluation.verification import SWAPS, verified

    free = plan.strategy == "optimal" and plan.target is None and not constrained
    loaded = original_of(plan, device, None)
    with TemporaryDirectory(prefix="bitrank-verify-") as folder:
        swaps = SWAPS if free else 0
        (found,) = verified(loaded, profile.offering(plan), [plan], Path(folder), progress, swaps)
    return with_warnings(found, profile)


def calibrate_profile(
    path: Path,
    output: Path,
    text: Path | None,
    tokens: int,
    plans: int,
    seed: int,
    progress: Progress,
    device: str = "cpu",
) -> Profile:
    """A copy of the profile whose gains are fitted to random plans, compressed and measured; resumes.

    Measured is on `text`, or on the windows that the profile holds back. Raises `ProfileError`, `CalibrationError`,
    and `PlanError` when the model's weights are no longer the profile's.
    """
    from profiler.documents.profile import load_profile
    from profiler.evaluation.plan_calibration import RecalibrationSettings, recalibrate
    from profiler.model.checkpoint import find_model, weights_sha256
    from profiler.model.layers import open_model
    from profiler.statistics.calibration import check_windows, text_tokens

    profile = load_profile(path)
    ref = find_model(profile.document.model.id)
    if weights_sha256(ref) != profile.document.model.weights_sha256:
        raise PlanError(f"the weights of {ref.id} are not those of {path}; profile this model again")
    loaded, settings = open_model(ref, device), RecalibrationSettings(plans=plans, seed=seed)
    tokens_NT = profile.probe_tokens() if text is None else text_tokens(loaded, text, tokens)
    check_windows(tokens_NT)
    made = recalibrate(loaded, profile, tokens_NT, output, settings, progress)
    remember(made)
    return made


def recover_checkpoint(
    path: Path,
    reference: str,
    output: Path,
    text: Path | None,
    tokens: int,
    settings: RecoverySettings,
    progress: Progress,
    device: str = "cpu",
) -> Recovered:
    """Train the scales of a compressed checkpoint towards the original; resumes an interrupted run of the same.

    On `text`, or on tokens sampled from the original. Raises `ModelError`, `CalibrationError`, `WorkError`.
    """
    import torch

    from compressor.checkpoint_writer import check_output
    from compressor.nn.linear import CompressedLinear
    from profiler.model.checkpoint import ModelError, find_model, weights_sha256
    from profiler.model.layers import load_model
    from profiler.recovery.recovery import recover
    from profiler.statistics.calibration import sample_tokens, text_tokens, tokens_sha256

    check_output(output)
    ref, original = find_model(str(path)), find_model(reference)
    loaded, teacher = load_model(ref, device), load_model(original, device)
    if not any(isinstance(module, CompressedLinear) for module in loaded.model.modules()):
        raise ModelError(f"{path} has no compressed layer; give a checkpoint that `bitrank compress` made")
    check_comparable(loaded, teacher)
    if text is None:
        tokens_NT = sample_tokens(teacher, tokens, settings.seed, progress)
    else:
        tokens_NT = text_tokens(teacher, text, tokens)

    @torch.no_grad()
    def logits(window_NT: Tensor) -> Tensor:
        logits_NTV: Tensor = teacher.model(window_NT, use_cache=False).logits
        return logits_NTV

    request = " ".join((weights_sha256(ref), weights_sha256(original), tokens_sha256(tokens_NT)))
    return recover(
        loaded.model,
        logits,
        tokens_NT.to(device),
        teacher.first_scored,
        ref.path,
        output.resolve(),
        settings,
        progress,
        request,
    )


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """An empty folder while open; what a killed run left in it goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model against its reference on one text; `low_rank_cache`: read through the cache that it was planned with."""

    model: str
    reference: str
    text: str
    kl_nats: float
    kl_standard_error: float
    perplexity: float
    reference_perplexity: float
    logits_cosine: float
    top1_agreement: float
    tokens: int
    tokens_per_second: float
    reference_tokens_per_second: float
    tensor_bytes: int
    reference_tensor_bytes: int
    low_rank_cache: bool
    samples: tuple[SamplePair, ...] = ()


def evaluate_model(
    model: str,
    reference: str,
    text: Path | None,
    tokens: int,
    progress: Progress,
    prompts: Sequence[str] = (),
    device: str = "cpu",
) -> Evaluation:
    """Measure `model` against `reference` on a text, or on text sampled from the reference where none is given."""
    from profiler.model.checkpoint import DEMO, DEMO_PATH, find_model
    from profiler.model.layers import load_model
    from profiler.statistics.calibration import sample_tokens, text_tokens

    original = load_model(find_model(reference), device)
    if prompts and original.tokenizer is None:
        raise BitrankError(f"{reference} has no tokenizer to read a prompt with; leave --prompt out")
    if text is None and reference == DEMO:
        text = DEMO_PATH / "evaluation.txt"
    if text is not None:
        tokens_NT, source = text_tokens(original, text, tokens), text.name
    else:
        tokens_NT, source = sample_tokens(original, tokens, 1, progress), "sampled from the reference"
    return evaluate_loaded(
        load_model(find_model(model), device), original, tokens_NT, source, progress, prompts
    )


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 file that hold anything. Raises `BitrankError` where it cannot be read or has none."""
    try:
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BitrankError(
            f"cannot read prompts from {path} ({error}); give UTF-8 text, one on every line"
        ) from error
    if not found:
        raise BitrankError(f"{path} has no prompt; write one on every line")
    return found


def check_comparable(compressed: LoadedModel, original: LoadedModel) -> None:
    """Raise `BitrankError` for models of different vocabularies."""
    vocabularies = [m.model.config.get_text_config().vocab_size for m in (compressed, original)]
    if vocabularies[0] != vocabularies[1]:
        raise BitrankError(
            f"{compressed.ref.id} has {vocabularies[0]} tokens and {original.ref.id} has {vocabularies[1]};"
            " only models of one vocabulary can be compared, so give the model it was made from as the reference"
        )


def evaluate_loaded(
    compressed: LoadedModel,
    original: LoadedModel,
    tokens_NT: Tensor,
    source: str,
    progress: Progress,
    prompts: Sequence[str] = (),
) -> Evaluation:
    from api.services.kvcache import cache_of
    from profiler.evaluation.divergence import live_logits, measure, tokens_per_second
    from profiler.evaluation.prompts import sample_pair
    from profiler.model.checkpoint import tensor_bytes

    check_comparable(compressed, original)
    cache = cache_of(compressed)
    found: Fidelity = measure(compressed.model, live_logits(original), tokens_NT, progress, cache)
    return Evaluation(
        model=compressed.ref.id,
        reference=original.ref.id,
        text=source,
        **asdict(found),
        tokens_per_second=tokens_per_second(compressed, cache=cache),
        reference_tokens_per_second=tokens_per_second(original),
        tensor_bytes=tensor_bytes(compressed.ref.path),
        reference_tensor_bytes=tensor_bytes(original.ref.path),
        low_rank_cache=cache is not None,
        samples=tuple(sample_pair(original, compressed, prompt) for prompt in prompts),
    )
