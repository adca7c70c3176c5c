"""What lies beside a profile as answers: where the loss comes from, block by block, and spectra.

What lives here: one way to a block's loss for the service, the page and the report. It is the measured one where the
profile has it, else the prediction of the profile itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from api.problems import ProblemError
from api.schemas.documents import BlockLoss, FidelityAnswer, Interval, SpectrumAnswer
from profiler.documents.sidecar import CliffDocument, FidelityDocument, SpectrumDocument

if TYPE_CHECKING:
    from allocator.storage import Option
    from profiler.documents.profile import Profile

BITS, GROUP_SIZE = 3, 64


def block_losses(profile: Profile) -> FidelityAnswer:
    """KL of compressing one block alone. Raises `CompanionError` where the measurement is damaged."""
    found = FidelityDocument.beside(profile.path, profile.document.model.weights_sha256)
    return predicted_losses(profile) if found is None else measured_losses(profile, found)


def measured_losses(profile: Profile, found: FidelityDocument) -> FidelityAnswer:
    return FidelityAnswer(
        profile=profile.sha256,
        source="measured",
        setting=_setting(found.option),
        blocks=[
            BlockLoss(
                block=block.block,
                kl_nats=block.probe_kl.mean,
                interval=Interval(low=block.probe_kl.low, high=block.probe_kl.high),
            )
            for block in found.blocks
        ],
        measured=found,
    )


def predicted_losses(profile: Profile) -> FidelityAnswer:
    """At 3 bits in groups of 64 where the grid has them, else at the option nearest to it that every layer was
    measured at. Raises `ProblemError` (unusable) where there is none."""
    shared = set.intersection(*({m.option for m in ms} for ms in profile.measurements.values()))
    if not shared:
        raise ProblemError("unusable", "the layers of this profile have no option in common; profile again")
    option = min(shared, key=lambda o: (o.rank, abs(o.bits - BITS), abs(o.group_size - GROUP_SIZE), o))
    total: dict[int, float] = {}
    for name, record in profile.document.layers.items():
        error = next(m.error for m in profile.measurements[name] if m.option == option)
        total[record.block] = total.get(record.block, 0.0) + error * profile.price(name, option.bits)
    low, high = profile.interval_factors
    return FidelityAnswer(
        profile=profile.sha256,
        source="predicted",
        setting=_setting(option),
        blocks=[
            BlockLoss(block=block, kl_nats=kl, interval=Interval(low=kl * low, high=kl * high))
            for block, kl in sorted(total.items())
        ],
        measured=None,
    )


def _setting(option: Option) -> str:
    return f"{option.bits} bits, group {option.group_size}"


def spectra(profile: Profile) -> SpectrumAnswer:
    """Energy and cliff. Raises `ProblemError` (not-measured), and `CompanionError` where a file is damaged."""
    weights = profile.document.model.weights_sha256
    found = SpectrumDocument.beside(profile.path, weights)
    if found is None:
        raise ProblemError(
            "not-measured",
            "this profile has no spectrum: it was made by an earlier version, or the model is large;"
            " write it into the profile's directory with `bitrank spectrum MODEL -o …/spectrum.json`",
        )
    return SpectrumAnswer(
        profile=profile.sha256, spectrum=found, cliff=CliffDocument.beside(profile.path, weights)
    )
