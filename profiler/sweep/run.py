"""Making a profile: begun once, swept block by block in any order and process, finished once; resumable throughout.

What lives here: settings, the run and its files under `.work`, and writing the profile directory. What the files of a
finished one mean is in `profile.py`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import cached_property, partial
from io import BytesIO
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file, save
from torch import Tensor

from allocator.atomic import alone, write_atomically
from allocator.plan import PlanModel
from allocator.storage import Option
from compressor.cuda.cuda_streams import side_by_side
from compressor.lowrank.decompose import ROUNDS
from compressor.nn.linear import weight_of
from compressor.quantize.descent import PASSES
from compressor.warmup import warm_up
from profiler.documents.profile import (
    COLUMNS,
    LATER_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_WEIGHTS,
    CalibrationRecord,
    LayerRecord,
    PartProbe,
    Profile,
    ProfileDocument,
    SelfCheck,
    load_profile,
)
from profiler.documents.sidecar import FidelityDocument, TablesDocument
from profiler.documents.workspace import is_finished, prepare
from profiler.evaluation.embeddings import write_tables
from profiler.evaluation.reference_configs import PROBES, keeper, measure_probes
from profiler.execution.memory import leave_no_holes, return_fragments, return_freed_memory
from profiler.execution.prefetch import Ahead
from profiler.execution.writer import Writer
from profiler.model.checkpoint import DEMO, DEMO_PATH, ModelRef, check_uncompressed, weights_sha256
from profiler.model.layers import Layer, LoadedModel, load_model, open_model
from profiler.prediction.calibration_factor import Probe, calibrate
from profiler.prediction.error_model import fit_error_model
from profiler.prediction.measurement import BITS, FACTOR_BITS, GROUP_SIZES, GridSettings, Measurement
from profiler.statistics.calibration import (
    CalibrationError,
    Progress,
    sample_tokens,
    silent,
    text_tokens,
    tokens_sha256,
)
from profiler.statistics.moments import (
    BlockCalls,
    BlockInputs,
    InputMoment,
    TokenWeights,
    block_calls,
    gradient_means,
    input_moments,
    weigh_tokens,
)
from profiler.studies.diagnostics import write_dossier
from profiler.sweep.self_check import (
    PART_OPTION,
    block_parts,
    check_plans,
    checked_gain,
    corrections,
    measure_classes,
    raw_costs,
)
from profiler.sweep.sweep import LayerSweep, RowPrice, default_ranks, sweep_layer

DEFAULT_TOKENS = 40_960
PROBE_SHARE = 5
"""One window in so many, but two at least, is held back from the statistics and measures the probes."""


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How to profile. `calibration`: UTF-8 texts, mixed evenly; without any, text is sampled from the model.
    ranks None picks them by width;
    rank_group_sizes None measures ranks at group 64 alone (at all three, the sweep takes about three times as long);
    adaptive measures a few options of every layer and predicts those that it can (`closed_form.py`); head_ratios and
    rotations as in `GridSettings`."""

    calibration: tuple[Path, ...] = ()
    tokens: int = DEFAULT_TOKENS
    seed: int = 0
    device: str = "cpu"
    bits: tuple[int, ...] = BITS
    ranks: tuple[int, ...] | None = None
    group_sizes: tuple[int, ...] = GROUP_SIZES
    rank_group_sizes: tuple[int, ...] | None = None
    factor_bits: tuple[int, ...] = FACTOR_BITS
    rounds: int = ROUNDS
    adaptive: bool = False
    head_ratios: tuple[float, ...] = ()
    rotations: bool = False


def build_profile(ref: ModelRef, output: Path, settings: ProfileSettings, progress: Progress) -> Profile:
    """Profile a model into `output`, resuming an interrupted run of the same settings.

    A finished profile of the same model and settings is returned as it is, its tables measured if an earlier version
    did not. Raises `ProfileError` when the directory holds something else, `InUseError` when another process is
    writing it.
    """
    run = open_run(ref, output, settings)
    if is_finished(output, run.request):
        return with_tables_measured(load_profile(output), run.loaded, progress)
    with alone(output):
        begin_profile(run, progress)
        sweep_blocks(run, range(run.block_count), progress)
        return finish_profile(run, progress)


def with_tables_measured(profile: Profile, loaded: LoadedModel, progress: Progress) -> Profile:
    """The finished profile; its tables are measured where no companion says so yet."""
    if (profile.path / TablesDocument.file_name).exists():
        return profile
    with alone(profile.path):
        write_tables(loaded, profile.document.model, profile.probe_tokens(), profile.path, progress)
    return profile


@dataclass(frozen=True)
class ProfileRun:
    """A profile being made in `output`: begun once, swept block by block in any order and process, finished once.

    Everything here follows from the model, the settings and the files under `work`, so that processes which share
    the directory share the run.
    """

    output: Path
    settings: ProfileSettings
    loaded: LoadedModel
    weights: str
    grid: GridSettings
    request: str
    seen_calls: BlockCalls = field(default_factory=dict)

    @property
    def work(self) -> Path:
        return self.output / ".work"

    @property
    def block_count(self) -> int:
        return len(self.loaded.block_names)

    @cached_property
    def given(self) -> tuple[Tensor | None, str]:
        """Token windows of the given or shipped text, None where they are sampled, and their source."""
        return given_tokens(self.loaded, self.settings)

    @cached_property
    def tokens(self) -> Tensor:
        """Every window (N, T) in the order of the seed; once begun, sampled windows come from `work`."""
        given_NT, seed = self.given[0], self.settings.seed
        if given_NT is None:
            given_NT = sampled_tokens(self.loaded, self.settings, self.work, silent)
        return shuffled(given_NT, seed)

    @property
    def probe_windows(self) -> int:
        return max(2, len(self.tokens) // PROBE_SHARE)

    @property
    def fitting_tokens(self) -> Tensor:
        return self.tokens[: len(self.tokens) - self.probe_windows]

    @property
    def probe_tokens(self) -> Tensor:
        return self.tokens[len(self.tokens) - self.probe_windows :]

    @cached_property
    def inputs(self) -> list[BlockInputs]:
        return block_inputs(self.loaded, self.fitting_tokens, self.work)

    @cached_property
    def token_weights(self) -> TokenWeights:
        """What every token of `fitting_tokens` weighs for every layer, from `work` once begun."""
        return weights_of_tokens(self, silent)

    @cached_property
    def gradient_means(self) -> dict[str, float]:
        """E[w] of every layer."""
        return gradient_means(self.loaded, self.token_weights)

    def price(self, layer: Layer) -> RowPrice:
        return RowPrice(
            self.gradient_means[layer.name], self.token_weights.row_shares(layer, self.loaded.device)
        )

    @property
    def calls(self) -> BlockCalls:
        """How blocks are called: as the gradients' pass saw, or, where it was run before, as another pass sees."""
        if not self.seen_calls:
            self.seen_calls.update(block_calls(self.loaded, self.fitting_tokens))
        return self.seen_calls

    def layer_file(self, layer: Layer) -> Path:
        """Where a layer's sweep lies once it is finished."""
        return self.work / "layers" / f"{layer.name}.json"

    def is_swept(self, layers: Iterable[Layer]) -> bool:
        return all(self.layer_file(layer).exists() for layer in layers)

    def report_sweep(self, progress: Progress) -> None:
        done = sum(self.layer_file(layer).exists() for layer in self.loaded.layers)
        progress("sweep", done, len(self.loaded.layers))


def open_run(ref: ModelRef, output: Path, settings: ProfileSettings) -> ProfileRun:
    """Load the model for a profile in `output`, which is neither read nor written yet."""
    return_freed_memory()
    leave_no_holes()
    check_uncompressed(ref)
    weights = weights_sha256(ref)
    loaded = open_model(ref, settings.device)
    grid = grid_of(loaded, settings)
    measured = TypeAdapter(GridSettings).dump_python(grid)
    request = json.dumps(
        {"weights": weights, "grid": measured, "settings": describe(settings)}, sort_keys=True
    )
    return ProfileRun(output, settings, loaded, weights, grid, request)


def begin_profile(run: ProfileRun, progress: Progress) -> None:
    """Tokens, their weights and every block's inputs into `run.work`, unless there. One process at a time."""
    given_NT, _ = run.given
    warm_up(run.loaded.device)
    work = prepare(run.output, run.request)
    for part in ("layers", "probes"):
        (work / part).mkdir(exist_ok=True)
    if given_NT is None:
        sampled_tokens(run.loaded, run.settings, run.work, progress)
    weights_of_tokens(run, progress)
    return_fragments()


def sweep_block(run: ProfileRun, index: int, progress: Progress) -> list[str]:
    """Measure the layers of one block of a begun run that have no file yet; the names of those measured."""
    return sweep_blocks(run, [index], progress)


def sweep_blocks(run: ProfileRun, indices: Iterable[int], progress: Progress) -> list[str]:
    """As `sweep_block`, of several blocks; each is measured while the disk takes in the one before it."""
    measured: list[str] = []
    warm_up(run.loaded.device)
    run.report_sweep(progress)
    wanted = (index for index in indices if not run.is_swept(run.loaded.layers_of(index)))
    with Writer() as writer, Ahead(run.loaded, run.inputs) as ahead:
        for index, following in pairwise(chain(wanted, [None])):
            assert index is not None
            if following is not None:
                ahead.bring(following)
            with ahead.held(index):
                measured += _sweep_block(run, index, writer, progress)
            return_fragments()
    run.report_sweep(progress)
    return measured


def _sweep_block(run: ProfileRun, index: int, writer: Writer, progress: Progress) -> Iterator[str]:
    moments = input_moments(run.loaded, index, run.calls, run.inputs[index], run.token_weights)
    left = [moment for moment in moments if not run.is_swept([moment.layer])]
    tasks = [partial(_sweep_layer, run, moment, run.price(moment.layer), writer) for moment in left]
    largest = max((moment.layer.weights for moment in left), default=0)
    for name in side_by_side(run.loaded.device, tasks, largest):
        yield name
        run.report_sweep(progress)


def _sweep_layer(run: ProfileRun, moment: InputMoment, price: RowPrice, writer: Writer) -> str:
    keep, settings = keeper(run.work / "probes", writer), run.settings
    sweep = sweep_layer(run.loaded, moment, price, run.grid, keep, settings.rounds, settings.adaptive)
    document = json.dumps(asdict(sweep)).encode()
    writer.submit(partial(write_atomically, run.layer_file(sweep.layer), document))
    return sweep.layer.name


def finish_profile(run: ProfileRun, progress: Progress) -> Profile:
    """Measure the probes of a run whose blocks are all swept, have the profile check itself, and write it."""
    loaded, output, tokens_NT = run.loaded, run.output, run.tokens
    sweeps = [read_sweep(run.layer_file(layer), layer) for layer in loaded.layers]
    table = measurements_table(sweeps)
    # What the check reads lies beside profile.json, which is written last and makes the profile whole.
    write_atomically(output / "calibration.safetensors", save({"tokens": tokens_NT.int()}))
    write_atomically(output / TOKEN_WEIGHTS, run.token_weights.serialized())
    write_atomically(output / "measurements.parquet", table)
    probes, kl_of_probes = probe(loaded, run.probe_tokens, sweeps, run.work, progress)
    document = profile_document(run, sweeps, probes, table)
    fidelity = write_dossier(
        loaded, document.model, run.probe_tokens, run.given[1], run.work, output, progress
    )
    document = checked(run, document, sweeps, kl_of_probes, fidelity, progress)
    write_tables(loaded, document.model, run.probe_tokens, output, progress)
    write_atomically(output / "profile.json", (document.model_dump_json(indent=1) + "\n").encode())
    shutil.rmtree(run.work)
    return load_profile(output)


def profile_document(
    run: ProfileRun, sweeps: Sequence[LayerSweep], probes: Sequence[Probe], table: bytes
) -> ProfileDocument:
    """What is known before the check."""
    loaded, weights = run.loaded, run.token_weights
    original_bytes = loaded.storage_dtype.itemsize
    return ProfileDocument(
        schema_version=SCHEMA_VERSION,
        model=PlanModel(id=loaded.ref.id, revision=loaded.ref.revision, weights_sha256=run.weights),
        architecture=type(loaded.model).__name__,
        storage_dtype=str(loaded.storage_dtype).removeprefix("torch."),
        calibration=CalibrationRecord(
            source=run.given[1],
            sha256=tokens_sha256(run.tokens),
            windows=len(run.fitting_tokens),
            probe_windows=run.probe_windows,
            window_tokens=run.tokens.shape[1],
            seed=run.settings.seed,
            text_start=loaded.text_start,
        ),
        grid=run.grid,
        rounds=run.settings.rounds,
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        }
        | {"python": platform.python_version()},
        measurements_sha256=hashlib.sha256(table).hexdigest(),
        layers={sweep.layer.name: layer_record(sweep, original_bytes) for sweep in sweeps},
        kept={name: t.numel() * t.element_size() for name, t in loaded.kept_tensors()},
        probes=tuple(probes),
        gain=calibrate(probes),
        unweighted=tuple(
            sweep.layer.name for sweep in sweeps if sweep.tokens and not weights.mean(sweep.layer.name)
        ),
    )


def checked(
    run: ProfileRun,
    document: ProfileDocument,
    sweeps: Sequence[LayerSweep],
    kl_of_probes: dict[Option, Tensor],
    fidelity: FidelityDocument | None,
    progress: Progress,
) -> ProfileDocument:
    """The document with its prices corrected, its gain that of real plans, and the check that says so."""
    loaded, raw = run.loaded, raw_costs(sweeps, PART_OPTION)
    parts: list[PartProbe] = []
    if raw and fidelity is not None:
        parts = measure_classes(loaded, run.probe_tokens, raw, run.work / "probes", progress)
        parts += block_parts(loaded, fidelity, raw)
        factor = corrections(loaded.layers, raw, parts)
        layers = {
            name: record.model_copy(update={"correction": factor[name]})
            for name, record in document.layers.items()
        }
        document = document.model_copy(update={"layers": layers})
    if not kl_of_probes:
        return document
    measurements = {sweep.layer.name: sweep.measurements for sweep in sweeps}
    profile = Profile(run.output, "", document, measurements)
    folder = run.work / "check"
    folder.mkdir(exist_ok=True)
    plans = check_plans(loaded, profile, kl_of_probes, folder, progress)
    if not any(plan.measured_kl > 0 and plan.predicted_kl > 0 for plan in plans):
        return document
    gain, agree = checked_gain(plans)
    check = SelfCheck(windows=run.probe_windows, parts=tuple(parts), plans=tuple(plans), agree=agree)
    return document.model_copy(update={"gain": gain, "check": check})


def grid_of(loaded: LoadedModel, settings: ProfileSettings) -> GridSettings:
    ranks = default_ranks(loaded.layers) if settings.ranks is None else settings.ranks
    usual = tuple(g for g in settings.group_sizes if g == 64) or settings.group_sizes[:1]
    rank_groups = settings.rank_group_sizes or usual
    return GridSettings(
        settings.bits,
        ranks,
        settings.group_sizes,
        rank_groups,
        settings.factor_bits,
        settings.head_ratios,
        settings.rotations,
    )


def describe(settings: ProfileSettings) -> dict[str, Any]:
    """The settings that the result depends on, beside the grid."""
    calibration = [hashlib.sha256(_bytes(path)).hexdigest() for path in settings.calibration]
    return {
        "calibration": calibration,
        "tokens": settings.tokens,
        "seed": settings.seed,
        "rounds": settings.rounds,
        "descent": f"{PASSES} passes, each block settled",
        "adaptive": settings.adaptive,
        "moments": "gradient and input together, token by token",
    }


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"cannot read {path} ({error.strerror}); give a UTF-8 text file") from error


def given_tokens(loaded: LoadedModel, settings: ProfileSettings) -> tuple[Tensor | None, str]:
    """Token windows (N, T) of the given or shipped text, None where they are to be sampled, and their source.

    Raises `CalibrationError` for fewer than three windows, of which two are held back.
    """
    least = 3 * loaded.window
    if settings.tokens < least:
        raise CalibrationError(f"--tokens {settings.tokens} is too few; give at least {least}, three windows")
    if settings.calibration:
        paths, source = settings.calibration, " + ".join(path.name for path in settings.calibration)
    elif loaded.ref.id == DEMO:
        paths, source = (DEMO_PATH / "calibration.txt",), "sampled, shipped"
    else:
        return None, "sampled from the model" + ("" if loaded.tokenizer is None else ", after openings")
    tokens_NT = text_tokens(loaded, paths, settings.tokens)
    if tokens_NT.numel() < least:
        raise CalibrationError(
            f"{' and '.join(map(str, paths))} have {tokens_NT.numel()} tokens in whole windows; give at least"
            f" {least}, three windows"
        )
    return tokens_NT, source


def sampled_tokens(loaded: LoadedModel, settings: ProfileSettings, work: Path, progress: Progress) -> Tensor:
    """Token windows (N, T) drawn from the whole model, kept in `work` so that a resumed run has the same."""
    file = work / "sampled.safetensors"
    if not file.exists():
        # Reading every block for every token would take hours.
        whole = loaded if loaded.stays_in_memory else load_model(loaded.ref, settings.device)
        tokens_NT = sample_tokens(whole, settings.tokens, settings.seed, progress)
        write_atomically(file, save({"tokens": tokens_NT}))
    return load_file(file)["tokens"]


def shuffled(tokens_NT: Tensor, seed: int) -> Tensor:
    return tokens_NT[torch.randperm(len(tokens_NT), generator=torch.Generator().manual_seed(seed))]


def block_inputs(loaded: LoadedModel, tokens_NT: Tensor, work: Path) -> list[BlockInputs]:
    hidden: int = weight_of(loaded.model.get_input_embeddings()).shape[1]
    hidden = getattr(loaded.model.config, "hidden_size", hidden)
    shape = (len(tokens_NT), tokens_NT.shape[1], hidden)
    return [BlockInputs(work / f"inputs-{index:05d}.f32", shape) for index in range(len(loaded.block_names))]


def weights_of_tokens(run: ProfileRun, progress: Progress) -> TokenWeights:
    file = run.work / TOKEN_WEIGHTS
    if not file.exists():
        tokens_NT, seed = run.fitting_tokens, run.settings.seed
        found, calls = weigh_tokens(run.loaded, tokens_NT, seed, run.inputs, progress)
        run.seen_calls.update(calls)
        write_atomically(file, found.serialized())
    return TokenWeights.load(file)


def read_sweep(file: Path, layer: Layer) -> LayerSweep:
    document = json.loads(file.read_text())
    measurements = tuple(
        Measurement(Option(**m["option"]), m["error"], m["half_width"]) for m in document["measurements"]
    )
    return LayerSweep(
        layer,
        measurements,
        document["signal"],
        document["sensitivity"],
        document["tokens"],
        document["leave_one_out"],
    )


def probe(
    loaded: LoadedModel, tokens_NT: Tensor, sweeps: Sequence[LayerSweep], work: Path, progress: Progress
) -> tuple[list[Probe], dict[Option, Tensor]]:
    """The probes whose option every layer was measured at, and their KL of every window."""
    costs = [
        {m.option: m.error * sweep.sensitivity for m in sweep.measurements if not m.half_width}
        for sweep in sweeps
    ]
    predicted = {o: sum(c[o] for c in costs) for o in PROBES if all(o in c for c in costs)}
    if not predicted:
        return [], {}
    return measure_probes(loaded, tokens_NT, predicted, work / "probes", progress)


def layer_record(sweep: LayerSweep, bytes_per_weight: int) -> LayerRecord:
    layer = sweep.layer
    return LayerRecord(
        block=layer.block,
        projection=layer.projection,
        rows=layer.rows,
        columns=layer.columns,
        original_bytes=layer.weights * bytes_per_weight,
        signal=sweep.signal,
        sensitivity=sweep.sensitivity,
        tokens=sweep.tokens,
        fit=fit_error_model(sweep.measurements, min(layer.rows, layer.columns)),
        leave_one_out=sweep.leave_one_out,
    )


def measurements_table(sweeps: Sequence[LayerSweep]) -> bytes:
    rows = [(s.layer.name, *astuple(m.option), m.error, m.half_width) for s in sweeps for m in s.measurements]
    columns = {name: list(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
    for name in ("heads", "rotated"):
        if set(columns[name]) <= {LATER_COLUMNS[name]}:
            del columns[name]
    table = pa.table(columns)
    buffer = BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()
