"""Companions of a profile: measurements of the same weights that may lie beside it, each one JSON file.

What lives here: the documents, their files and their digests. How they are measured is in `fidelity.py`,
`spectrum.py`, `embeddings.py` and `cliff.py`. A companion belongs to weights, not to one profile: beside a profile of
other weights it is refused.

    fidelity.json   what every block contributes; written with the profile
    spectrum.json   how the energy of every matrix and head spreads; written with the profile
    tables.json     what the embedding and the output head cost in fewer bits; written with the profile
    cliff.json      what is lost as rank falls; written there by `bitrank cliff`
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from allocator.atomic import write_atomically
from allocator.errors import BitrankError
from allocator.plan import PlanModel
from allocator.problem import TableRole
from allocator.storage import Option
from profiler.statistics.estimate import Estimate
from profiler.statistics.ushape import Shape


class CompanionError(BitrankError):
    """A companion file is missing, damaged, newer than this version, or of other weights."""


class Companion(BaseModel):
    """What every companion has. `content_sha256` is over the other fields, as the file has them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    newest: ClassVar[int] = 1
    file_name: ClassVar[str]

    schema_version: int = 1
    model: PlanModel
    content_sha256: str = ""

    @property
    def digest(self) -> str:
        return sha256(self.model_dump_json(exclude={"content_sha256"}).encode()).hexdigest()

    def save(self, path: Path) -> Self:
        """Write the file whole or not at all; the companion with its digest."""
        sealed = self.model_copy(update={"content_sha256": self.digest})
        write_atomically(path, (sealed.model_dump_json(indent=1) + "\n").encode())
        return sealed

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a companion. Raises `CompanionError`."""
        try:
            data = path.read_bytes()
            version = json.loads(data)["schema_version"]
            if version > cls.newest:
                raise CompanionError(
                    f"{path} has schema {version}, this version reads up to {cls.newest}; upgrade bitrank"
                )
            found = cls.model_validate_json(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CompanionError):
                raise
            reason = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
            raise CompanionError(f"{path} is damaged ({reason}); measure it again") from error
        if found.content_sha256 != found.digest:
            raise CompanionError(f"{path} does not match its own digest; measure it again")
        return found

    @classmethod
    def beside(cls, profile: Path, weights_sha256: str) -> Self | None:
        """The companion in a profile's directory, None where there is none. Raises `CompanionError`."""
        path = profile / cls.file_name
        if not path.exists():
            return None
        found = cls.load(path)
        if found.model.weights_sha256 != weights_sha256:
            raise CompanionError(f"{path} was measured on other weights than the profile; measure it again")
        return found


@dataclass(frozen=True, slots=True)
class BlockFidelity:
    """One block. `embedding_recovery` is None where hidden states and embeddings differ in width; `outlier_in` names
    the measures in which the block stands apart from the others."""

    block: int
    tier: str
    outlier_in: tuple[str, ...]
    probe_kl: Estimate
    block_influence: Estimate
    collision_margin: Estimate
    embedding_recovery: Estimate | None


class FidelityDocument(Companion):
    """fidelity.json. `option` is the probe setting; intervals have the given confidence, over windows of the text."""

    file_name: ClassVar[str] = "fidelity.json"

    option: Option
    calibration: str
    text: str
    windows: int
    window_tokens: int
    negatives: int
    confidence: float
    resamples: int
    seed: int
    blocks: tuple[BlockFidelity, ...]
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One matrix: its smaller side, the least ranks that hold `SHARES` of the energy, and the energy at the ranks
    ⌈k·full_rank/32⌉, k from 1 to 32."""

    full_rank: int
    ranks: tuple[int, ...]
    energy: tuple[float, ...]

    def energy_at(self, rank: int) -> float:
        """The energy in the leading `rank` directions, by the chord between its neighbours: never too much."""
        steps = len(self.energy)
        known = [0, *(-(-k * self.full_rank // steps) for k in range(1, steps + 1))]
        return float(np.interp(rank, known, (0.0, *self.energy)))


@dataclass(frozen=True, slots=True)
class HeadSpectrum:
    """The part of a layer that belongs to one head; `role` is q, k, v or o."""

    role: str
    head: int
    spectrum: Spectrum


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """One layer, and its heads where it belongs to the attention."""

    block: int
    projection: str
    rows: int
    columns: int
    spectrum: Spectrum
    heads: tuple[HeadSpectrum, ...]


class SpectrumDocument(Companion):
    """spectrum.json. `shares` says which energies the `ranks` hold."""

    file_name: ClassVar[str] = "spectrum.json"

    shares: tuple[float, ...]
    layers: dict[str, LayerSpectrum]


@dataclass(frozen=True, slots=True)
class TableMeasurement:
    """error: relative squared error of the weights; kl_nats per token, of the model with this table alone rounded.
    Where not `measured`, the KL is that of the same bits at another group size, scaled by the errors."""

    option: Option
    error: float
    kl_nats: float
    measured: bool


@dataclass(frozen=True, slots=True)
class TableRecord:
    """One table, vocabulary × hidden, and what was measured of it."""

    role: TableRole
    rows: int
    columns: int
    original_bytes: int
    measurements: tuple[TableMeasurement, ...]


class TablesDocument(Companion):
    """tables.json: every table of the model by its module's name; none where it has none of a plain kind."""

    file_name: ClassVar[str] = "tables.json"

    windows: int
    window_tokens: int
    tables: dict[str, TableRecord]


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut of a group: `ratio` of the full rank and share of the energy that are left, the means over its parts;
    KL in nats/token; `repetition`, the share of 4-grams in greedy continuations that were there before."""

    ratio: float
    energy: float
    kl: Estimate
    repetition: float


@dataclass(frozen=True, slots=True)
class GroupCliff:
    """One group. `cuts` from the full rank down; `energy_cut` leaves every part 95 % of its energy. `cliff_ratio` and
    `cliff_energy` are where the loss of a 4-bit model doubles, None where no measured cut costs so much."""

    group: str
    full_rank: int
    cuts: tuple[Cut, ...]
    energy_cut: Cut
    cliff_ratio: float | None
    cliff_energy: float | None
    energy_is_enough: bool


class CliffDocument(Companion):
    """cliff.json. `threshold_kl` is what rounding every matrix to 4 bits costs on the same text."""

    file_name: ClassVar[str] = "cliff.json"

    text: str
    windows: int
    window_tokens: int
    threshold_kl: float
    energy_share: float
    confidence: float
    prompts: int
    new_tokens: int
    ngram: int
    groups: tuple[GroupCliff, ...]
