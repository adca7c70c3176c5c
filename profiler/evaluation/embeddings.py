"""Tables of a model, its input embedding and its output head: which there are, and what fewer bits cost.

What lives here: finding them, a model with some of them rounded, and measuring each. They are rounded and looked up in
`compressor/nn/embedding.py`; the document is in `sidecar.py`. Position embeddings are not tables.

A table is priced by measuring: the KL, in nats/token, of the model in which it alone is rounded, in both its roles
where it is tied. No gain and no sensitivity have a part in it. KL is quadratic in a small change of the weights, so
only one group size is measured at each width, and the others cost as much more as their squared error is larger:
three passes over the model for a table instead of nine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from allocator.plan import PlanModel
from allocator.problem import TableRole
from allocator.storage import KEEP_BITS, Option
from compressor.nn.embedding import rounded_table
from profiler.documents.sidecar import TableMeasurement, TableRecord, TablesDocument
from profiler.evaluation.divergence import Reference, measure, stored_logits
from profiler.model.layers import LoadedModel
from profiler.statistics.calibration import Progress

BITS = (8, 6, 4)
GROUP_SIZES = (64, 32, 128)
"""The first is measured."""
ROWS = 4096
"""Rows that are compared at once."""
WINDOWS = 4
"""Windows that a table is measured on, at most."""


@dataclass(frozen=True, slots=True)
class Table:
    """A stored matrix of vocabulary × hidden, named for its module, and the modules that compute with it."""

    name: str
    role: TableRole
    modules: tuple[nn.Module, ...]

    @property
    def weight(self) -> Tensor:
        """float32, as the model computes with it now."""
        weight = self.modules[0].weight
        assert isinstance(weight, Tensor)
        return weight


def find_tables(loaded: LoadedModel) -> list[Table]:
    """Plain embeddings and heads: one that scales what it looks up, is stored under another's name, or is of another
    kind stays as it is, and the other with it."""
    model = loaded.model
    name_of = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or (head is not None and type(head) is not nn.Linear):
        return []
    name = name_of[id(embedding)]
    if f"{name}.weight" in model.all_tied_weights_keys:
        return []
    if head is None:
        return [Table(name, "embedding", (embedding,))]
    if head.weight is embedding.weight:
        return [Table(name, "tied", (embedding, head))]
    return [Table(name, "embedding", (embedding,)), Table(name_of[id(head)], "head", (head,))]


@contextmanager
def tables_rounded(loaded: LoadedModel, options: Mapping[str, Option]) -> Iterator[None]:
    """While open, the model computes with its tables as `options` by name stores them; those not named as they are."""
    chosen = [(t, options[t.name]) for t in find_tables(loaded) if t.name in options]
    before = [(table, table.weight) for table, _ in chosen]
    try:
        for table, option in chosen:
            if option.bits != KEEP_BITS:
                _put(table, rounded_table(table.weight, option))
        yield
    finally:
        for table, weight_Vd in before:
            _put(table, weight_Vd)


def _put(table: Table, weight_Vd: Tensor) -> None:
    parameter = nn.Parameter(weight_Vd, requires_grad=False)
    for module in table.modules:
        module._parameters["weight"] = parameter


def write_tables(
    loaded: LoadedModel, model: PlanModel, tokens_NT: Tensor, output: Path, progress: Progress
) -> None:
    """Measure every table on windows held back from the statistics, at most `WINDOWS`, and write tables.json."""
    tokens_NT = tokens_NT[:WINDOWS]
    tables = find_tables(loaded)
    with TemporaryDirectory(prefix="bitrank-tables-") as folder:
        reference = stored_logits(loaded, tokens_NT, Path(folder) / "reference.f32")
        records: dict[str, TableRecord] = {}
        for table in tables:
            records[table.name] = measure_table(loaded, table, reference, tokens_NT)
            progress("measuring tables", len(records), len(tables))
    TablesDocument(
        model=model, windows=len(tokens_NT), window_tokens=tokens_NT.shape[1], tables=records
    ).save(output / TablesDocument.file_name)


@torch.no_grad()
def measure_table(loaded: LoadedModel, table: Table, reference: Reference, tokens_NT: Tensor) -> TableRecord:
    """The error of every option, and the KL: measured at the first group size, scaled by the errors at the others."""
    measurements: list[TableMeasurement] = []
    weight_Vd = table.weight
    for bits in BITS:
        option = Option(bits, 0, GROUP_SIZES[0], 0)
        with tables_rounded(loaded, {table.name: option}):
            base = _relative_error(table.weight, weight_Vd)
            kl_nats = measure(loaded.model, reference, tokens_NT).kl_nats
        measurements.append(TableMeasurement(option, base, kl_nats, measured=True))
        for group_size in GROUP_SIZES[1:]:
            option = Option(bits, 0, group_size, 0)
            error = _relative_error(rounded_table(weight_Vd, option), weight_Vd)
            scaled = kl_nats * error / base if base else kl_nats
            measurements.append(TableMeasurement(option, error, scaled, measured=False))
    rows, columns = weight_Vd.shape
    return TableRecord(
        table.role, rows, columns, rows * columns * loaded.storage_dtype.itemsize, tuple(measurements)
    )


def _relative_error(rounded_Vd: Tensor, weight_Vd: Tensor) -> float:
    """‖rounded − weight‖² / ‖weight‖², some rows at a time."""
    pairs = zip(rounded_Vd.split(ROWS), weight_Vd.split(ROWS), strict=True)
    difference: float = sum((found - given).square().sum().item() for found, given in pairs)
    whole: float = sum(given.square().sum().item() for given in weight_Vd.split(ROWS))
    return difference / max(1e-30, whole)
