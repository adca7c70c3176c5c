"""The functions of the Python interface: profile, plan, compress, evaluate.

What lives here: types and defaults that suit Python. What they do is in `api/services`; progress is silent unless a
function is given that is told of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.plan import Plan, load_plan

if TYPE_CHECKING:
    from api.services.usecases import Evaluation, FrontierPoint
    from profiler.documents.profile import Profile as MeasuredProfile

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""
Folder = str | PathLike[str]


def _silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of a model, in a directory that `bitrank.profile` wrote; plans are made from it."""

    measured: MeasuredProfile

    @property
    def path(self) -> Path:
        return self.measured.path

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever plans from this profile should know, one sentence each."""
        return self.measured.warnings

    def plan(
        self,
        budget: str | None = None,
        *,
        strategy: str = "optimal",
        target: str | None = None,
        embeddings: bool = False,
        verify: bool = False,
        device: str = "cpu",
        progress: Progress = _silent,
    ) -> Plan:
        """The plan of least predicted loss for a budget ("3.25bpw", "700MiB", "25%"), with its certificate.

        strategy: or another one, as for `bitrank plan`. target: only what that runtime executes. embeddings: decide on
        the input embedding and the output head too. verify: measure the plan beside uniform, which takes minutes.
        Raises `bitrank.Error`.
        """
        from api.services.usecases import check_planning, plan_budget, verify_plan

        check_planning(budget, strategy, False, target)
        profile = self.measured.with_tables if embeddings else self.measured
        plan = plan_budget(profile, budget, strategy, target=target)
        return verify_plan(plan, profile, progress, device) if verify else plan

    def frontier(self) -> list[FrontierPoint]:
        """The least predicted loss at every size."""
        from api.services.usecases import frontier_points

        return frontier_points(self.measured)


def profile(
    model: str, output: Folder, *, device: str = "cpu", progress: Progress = _silent, **settings: Any
) -> Profile:
    """Measure a model once, so that every budget can be planned from the result; resumes where it stopped.

    model: a directory, a hub id or "demo". output: the directory to write. settings: those of
    `profiler.sweep.run.ProfileSettings`, such as `tokens`, `seed`, `calibration`, `adaptive`. Raises `bitrank.Error`.
    """
    from api.services.usecases import profile_model
    from profiler.sweep.run import ProfileSettings

    texts = settings.pop("calibration", ())
    texts = (texts,) if isinstance(texts, str | PathLike) else texts
    asked = ProfileSettings(calibration=tuple(map(Path, texts)), device=device, **settings)
    return Profile(profile_model(str(model), Path(output), asked, progress))


def load(path: Folder) -> Profile:
    """A profile that was made before. Raises `bitrank.Error` where there is none, or a damaged one."""
    from profiler.documents.profile import load_profile

    return Profile(load_profile(Path(path)))


def compress(
    plan: Plan | Folder,
    output: Folder,
    *,
    profile: Profile | Folder | None = None,
    model: str | None = None,
    device: str = "cpu",
    progress: Progress = _silent,
) -> Path:
    """Carry a plan out into a checkpoint directory that transformers loads; resumes where it stopped.

    plan: or the path of a plan.json. profile: the one it was made from, where it is not found by itself. model: where
    the original is, if it has moved. Raises `bitrank.Error`.
    """
    from api.services.usecases import execute, find_profile
    from compressor.checkpoint_writer import check_output

    check_output(Path(output))
    path = Path("plan.json") if isinstance(plan, Plan) else Path(plan)
    made = plan if isinstance(plan, Plan) else load_plan(path)
    if isinstance(profile, Profile):
        profile = profile.path
    measured = find_profile(made, path, None if profile is None else Path(profile))
    execute(made, measured, Path(output), progress, device, model)
    return Path(output)


def evaluate(
    model: Folder,
    *,
    reference: str,
    text: Folder | None = None,
    tokens: int = 32_768,
    device: str = "cpu",
    progress: Progress = _silent,
) -> Evaluation:
    """How far a model is from its original: KL in nats per token, perplexity, agreement, speed.

    text: UTF-8 text to measure on; without it, text is sampled from the original. Raises `bitrank.Error`.
    """
    from api.services.usecases import evaluate_model

    given = None if text is None else Path(text)
    return evaluate_model(str(model), reference, given, tokens, progress, (), device)
