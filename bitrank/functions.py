"""The functions of the Python interface: profile, plan, compress, evaluate.

What lives here: types and defaults that suit Python. What they do is in `api/services`; progress is silent unless a
function is given that is told of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.errors import BitrankError
from allocator.plan import Plan, load_plan

if TYPE_CHECKING:
    from api.services.usecases import Evaluation, FrontierPoint
    from profiler.documents.profile import Profile as MeasuredProfile
    from profiler.sweep.run import ProfileSettings

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""
Folder = str | PathLike[str]
ALLOWED = {
    "bits": {0, 2, 3, 4, 5, 6, 8},
    "group_sizes": {32, 64, 128},
    "rank_group_sizes": {32, 64, 128},
    "factor_bits": {4, 8, 16},
}
"""Values of settings, as for `bitrank profile`."""


def _silent(stage: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured of a model, in a directory that `bitrank.profile` wrote; plans are made from it."""

    measured: MeasuredProfile

    def __repr__(self) -> str:
        return f"bitrank.Profile({str(self.path)!r}, of {self.measured.document.model.id!r})"

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

        if budget is not None and not isinstance(budget, str):
            raise TypeError(f"a budget is a text such as '3.25bpw', '700MiB' or '25%', not {budget!r}")
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

    return Profile(profile_model(str(model), Path(output), _checked(settings, device), progress))


def _checked(settings: dict[str, Any], device: str) -> ProfileSettings:
    """The settings, before anything is measured by them. Raises `TypeError` for a name, `BitrankError` for a value."""
    from pydantic import TypeAdapter, ValidationError

    from profiler.sweep.run import ProfileSettings

    names = [field.name for field in fields(ProfileSettings)]
    for name in settings:
        if name not in names:
            raise TypeError(f"there is no setting {name!r}; choose from {', '.join(names)}")
    texts = settings.get("calibration", ())
    given = settings | {"device": device}
    if isinstance(texts, str | PathLike):
        given["calibration"] = (texts,)
    try:
        found = TypeAdapter(ProfileSettings).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = str(first["loc"][0]) if first["loc"] else "settings"
        raise BitrankError(f"the setting {wrong} cannot be {given.get(wrong)!r} ({first['msg']})") from None
    for name, allowed in ALLOWED.items():
        values = getattr(found, name)
        if values is not None and (not values or not set(values) <= allowed):
            raise BitrankError(
                f"the setting {name} cannot be {values!r}; give some of {', '.join(map(str, sorted(allowed)))}"
            )
    if not any(found.bits):
        raise BitrankError("bits of 0, which is low rank alone, need another width beside them")
    if found.ranks is None:
        return found
    if not found.ranks or min(found.ranks) < 0:
        raise BitrankError(f"the setting ranks cannot be {found.ranks!r}; a rank is 0 or more")
    return replace(found, ranks=tuple(sorted({0, *found.ranks})))


def load(path: Folder) -> Profile:
    """A profile that was made before. Raises `bitrank.Error` where there is none, or a damaged one."""
    from api.services.usecases import remember
    from profiler.documents.profile import load_profile

    measured = load_profile(Path(path))
    remember(measured)  # so that `compress` finds it by a plan
    return Profile(measured)


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

    if tokens < 1:
        raise BitrankError(f"tokens cannot be {tokens}; give at least one window of the model")
    given = None if text is None else Path(text)
    return evaluate_model(str(model), reference, given, tokens, progress, (), device)
