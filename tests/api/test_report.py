"""The report of `bitrank demo`: one file, offline, inert, repeatable, written whole or not at all."""

import base64
import hashlib
import html
import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from api.report.report import SCRIPTS, WEB, headlines, render_report, uniform_kl_at, write_report
from api.schemas.report import EvaluationRow, Report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    "</script ></script><img src=x onerror=\"document.title='owned'\"><!--<script>{{ data }}\u2028&lt;b&gt;"
)
ATTENTION = dict.fromkeys((f"self_attn.{name}_proj" for name in "qkvo"), 192 * 192)
PROJECTIONS = ATTENTION | dict.fromkeys((f"mlp.{name}_proj" for name in ("gate", "up", "down")), 192 * 512)
BLOCKS = 12
BITS = (2, 3, 4, 5, 6, 8)
EMBEDDING_BYTES = 3_200_000
WEIGHT_COUNT = BLOCKS * sum(PROJECTIONS.values())
FIT = {"c": 1.9, "beta": 1.98, "r0": 21.0, "delta": 0.42, "eta": 0.8, "n": 192, "r_squared": 0.9991}


def error_at(bits: float, rank: int, group_size: int, difficulty: float) -> float:
    correction = (1 + rank / FIT["r0"]) ** -FIT["delta"] * (1 - rank / FIT["n"]) ** FIT["eta"]
    return float(difficulty * FIT["c"] * 2 ** (-FIT["beta"] * bits) * correction * (group_size / 64) ** 0.2)


def difficulty_of(block: int, place: int) -> float:
    return 1 + 0.06 * ((block * 5 + place * 3) % 7)


def layer_options(block: int, projection: str) -> list[dict[str, Any]]:
    weights, place = PROJECTIONS[projection], list(PROJECTIONS).index(projection)
    depth = {0: 4.6, 8: 1.6}.get(block, 1.0)
    sensitivity = depth * (0.6 + 0.3 * ((place * 4) % 7)) * weights / 8e6
    options = []
    for bits, group_size, rank in product(BITS, (32, 64, 128), (0, 16)):
        error = error_at(bits, rank, group_size, difficulty_of(block, place))
        factor_bytes = rank * (192 + weights // 192) // (6 if block == 0 else 2)
        options.append(
            {
                "name": f"model.layers.{block}.{projection}",
                "block": block,
                "projection": projection.split(".")[1],
                "bits": bits,
                "rank": rank,
                "group_size": group_size,
                "factor_bits": 4 if rank else 0,
                "total_bytes": weights * bits // 8 + weights // group_size * (16 + bits) // 8 + factor_bytes,
                "error": error,
                "cost": sensitivity * error,
            }
        )
    return options


def chosen_layers(price: float) -> list[dict[str, Any]]:
    layers = [layer_options(block, projection) for block in range(BLOCKS) for projection in PROJECTIONS]
    return [min(options, key=lambda o: o["cost"] + price * o["total_bytes"]) for options in layers]


def point(layers: list[dict[str, Any]]) -> dict[str, Any]:
    total_bytes = sum(layer["total_bytes"] for layer in layers)
    return {
        "total_bytes": total_bytes + EMBEDDING_BYTES,
        "bits_per_weight": 8 * total_bytes / WEIGHT_COUNT,
        "kl_nats": sum(layer["cost"] for layer in layers),
    }


def uniform_point(bits: int) -> dict[str, Any]:
    setting = (bits, 64, 0)
    options = [o for block in range(BLOCKS) for name in PROJECTIONS for o in layer_options(block, name)]
    layers = [o for o in options if (o["bits"], o["group_size"], o["rank"]) == setting]
    return {"label": f"{bits} bits", **point(layers)}


def plan_at(price: float, label: str) -> dict[str, Any]:
    layers = chosen_layers(price)
    summary = point(layers)
    return {
        "label": label,
        "budget_text": label.replace(" ", ""),
        "total_bytes": summary["total_bytes"],
        "bits_per_weight": summary["bits_per_weight"],
        "predicted_kl": summary["kl_nats"],
        "lower_bound": summary["kl_nats"] * 0.99998,
        "gap": 2e-5,
        "shadow_price_nats_per_mib": price * 2**20,
        "layers": layers,
    }


def curve(block: int, projection: str) -> dict[str, Any]:
    difficulty = difficulty_of(block, list(PROJECTIONS).index(projection))
    ranks = (0, 8, 16, 32, 64)
    measured = [
        {
            "bits": bits,
            "rank": rank,
            "group_size": group_size,
            "factor_bits": 4 if rank else 0,
            "error": error_at(bits, rank, group_size, difficulty) * (1 + 0.05 * ((bits * 7 + rank) % 5 - 2)),
        }
        for bits, rank, group_size in product(BITS, ranks, (32, 64, 128))
    ]
    fitted = [
        {"bits": bits, "rank": rank, "group_size": 64, "error": error_at(bits, rank, 64, difficulty)}
        for rank, bits in product(ranks, (2 + step / 4 for step in range(25)))
    ]
    return {
        "layer": f"model.layers.{block}.{projection}",
        "block": block,
        "projection": projection.split(".")[1],
        "fit": FIT,
        "measured": measured,
        "fitted": fitted,
    }


def evaluation(text: str, scale: float, name: str, kind: str, size: dict[str, Any]) -> dict[str, Any]:
    kl_nats = size["kl_nats"] / 0.85 * scale
    return {
        "text": text,
        "name": name,
        "kind": kind,
        "bits_per_weight": size["bits_per_weight"],
        "tensor_bytes": size["total_bytes"],
        "predicted_kl": size["kl_nats"],
        "kl_nats": kl_nats,
        "perplexity": 31.2 * scale * (1 + kl_nats),
        "reference_perplexity": 31.2 * scale,
        "logits_cosine": 1 - kl_nats / 20,
        "top1_agreement": 1 - kl_nats * 0.9,
        "tokens_per_second": 1840.0,
    }


def report_data() -> dict[str, Any]:
    budgets = ((1.9e-7, "2.6 bpw"), (8.2e-8, "3.3 bpw"), (2.5e-8, "4.3 bpw"))
    plans = [plan_at(price, label) for price, label in budgets]
    uniform = [uniform_point(bits) for bits in BITS]
    sizes = [{**plan, "kl_nats": plan["predicted_kl"]} for plan in plans]
    samples = [
        ("The old house stood", " at the end of the lane, and nobody had opened its shutters since.", "by"),
        (
            "def read(path):",
            "\n    with open(path) as file:\n        return file.read()",
            "\n    return path",
        ),
    ]
    checkpoints = [(f"plan {plans[1]['label']}", "plan", sizes[1])]
    checkpoints += [(f"uniform {u['label']}", "uniform", u) for u in uniform[:3]]
    return {
        "bitrank_version": "0.1.0",
        "model": {
            "id": "demo",
            "weights_sha256": hashlib.sha256(b"demo").hexdigest(),
            "layer_count": BLOCKS * len(PROJECTIONS),
            "compressible_weights": WEIGHT_COUNT,
            "original_bytes": 2 * WEIGHT_COUNT + EMBEDDING_BYTES,
        },
        "fidelity_label": "3 bits, group 64",
        "fidelity": [
            {"block": block, "kl_nats": kl, "kl_low": kl * 0.88, "kl_high": kl * 1.13}
            for block in range(BLOCKS)
            for kl in [0.012 * (4.6 if block == 0 else 1.6 if block == 8 else 1 + 0.1 * ((block * 5) % 4))]
        ],
        "curves": [curve(block, projection) for block in range(BLOCKS) for projection in PROJECTIONS],
        "frontier": {
            "optimal": [point(chosen_layers(3e-6 * 0.93**step)) for step in range(110)],
            "uniform": uniform,
            "measured": [
                {"label": name, "kind": kind, **size, "kl_nats": size["kl_nats"] / 0.85}
                for name, kind, size in [
                    *((plan["label"], "plan", point(plan["layers"])) for plan in plans),
                    *((u["label"], "uniform", {k: u[k] for k in u if k != "label"}) for u in uniform[:3]),
                ]
            ],
        },
        "plans": plans,
        "evaluations": [
            evaluation(text, scale, name, kind, size)
            for text, scale in (("text sampled from the model", 1.0), ("pydoc_data.topics (human)", 1.6))
            for name, kind, size in checkpoints
        ],
        "samples": [{"prompt": p, "reference": r, "compressed": r[:24] + c} for p, r, c in samples],
    }


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return report_data()


@pytest.fixture(scope="module")
def report(data: dict[str, Any]) -> Report:
    return Report.model_validate(data)


@pytest.fixture(scope="module")
def small(data: dict[str, Any]) -> dict[str, Any]:
    """The least that a report may hold: nothing compressed, no interval, no uniform setting."""
    return {
        **data,
        "fidelity": [{"block": 0, "kl_nats": 0.01}],
        "curves": data["curves"][:1],
        "frontier": {"optimal": data["frontier"]["optimal"][:5], "uniform": [], "measured": []},
        "plans": [{**data["plans"][0], "layers": data["plans"][0]["layers"][:1]}],
        "evaluations": [],
        "samples": [],
    }


@pytest.fixture
def hostile(data: dict[str, Any]) -> Report:
    """The same report with hostile text in every place where a model, a file or a user can put text."""
    text = json.dumps(data)
    free = {
        "bitrank_version",
        "id",
        "weights_sha256",
        "fidelity_label",
        "layer",
        "projection",
        "name",
        "label",
    }
    free |= {"budget_text", "text", "prompt", "reference", "compressed"}

    def poison(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: v + HOSTILE if k in free and isinstance(v, str) else v for k, v in pairs}

    return Report.model_validate(json.loads(text, object_pairs_hook=poison))


class PageReader(HTMLParser):
    """What a browser makes of the page before any script runs: its elements and the source of its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def data_block(page: str) -> str:
    block = re.search(r'id="report-data">(.*?)</script>\n<script>', page, re.DOTALL)
    assert block is not None
    return block[1]


def browse(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page after its scripts ran in a real browser, and what the browser wrote to its console."""
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000"
    arguments = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


def test_nothing_in_the_page_is_fetched_from_anywhere(report: Report) -> None:
    page = render_report(report)
    reader = PageReader(page)
    fetching = {"src", "href", "srcset", "action", "data", "poster", "background", "manifest"}
    assert [
        (tag, name) for tag, attributes in reader.elements for name in attributes if name in fetching
    ] == []
    assert not {"link", "iframe", "object", "embed", "base", "img"} & set(reader.tags)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_page_s_own_scripts_and_no_other(report: Report) -> None:
    reader = PageReader(render_report(report))
    policy = next(
        a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    allowed = re.search(r"script-src ([^;]*)", policy)
    assert allowed is not None
    data_block, *scripts = reader.scripts
    assert json.loads(data_block)["report"]["model"]["id"] == "demo"
    assert allowed[1].split() == [content_hash(source) for source in scripts]


def content_hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def test_hostile_text_adds_no_element_to_the_page(report: Report, hostile: Report) -> None:
    assert PageReader(render_report(hostile)).tags == PageReader(render_report(report)).tags


@given(text=st.text())
@example(text=HOSTILE)
@settings(max_examples=40, deadline=None)
def test_any_text_reaches_the_page_unchanged(small: dict[str, Any], text: str) -> None:
    samples = [{"prompt": text, "reference": text, "compressed": text}]
    block = data_block(render_report(Report.model_validate({**small, "samples": samples})))
    assert json.loads(block)["report"]["samples"] == samples
    assert block.isascii()
    assert not set("<>&") & set(block)


def test_the_same_report_gives_the_same_bytes(data: dict[str, Any], report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "first.html", report)
    write_report(tmp_path / "second.html", Report.model_validate_json(json.dumps(data)))
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_the_page_carries_the_licence_of_every_vendored_script(report: Report) -> None:
    page = render_report(report)
    for holder in ("Mike Bostock", "Observable, Inc.", "Mikola Lysenko"):
        assert f"{holder}\n" in page[page.index("<footer>") : page.index("</footer>")]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.startswith("vendor/")])
def test_a_vendored_script_is_the_one_its_readme_names(name: str) -> None:
    digest = hashlib.sha256((WEB / name).read_bytes()).hexdigest()
    assert digest in (WEB / "vendor" / "README.md").read_text(encoding="utf-8")


def test_writing_replaces_an_earlier_report_and_leaves_one_file(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier")
    write_report(path, report)
    assert path.read_text(encoding="utf-8") == render_report(report)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named_and_not_created(report: Report, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write the report .*absent.*: choose a file"):
        write_report(tmp_path / "absent" / "report.html", report)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder_is_refused(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="cannot write the report"):
        write_report(tmp_path / "file" / "report.html", report)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_in_the_place_of_the_report_is_refused_and_nothing_is_left(
    report: Report, tmp_path: Path
) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match="cannot write the report"):
        write_report(tmp_path / "report.html", report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file of this process may grow past the limit: a write fails halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_halfway_keeps_the_earlier_report(
    report: Report, tmp_path: Path, file_size_limit: int
) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier")
    with pytest.raises(OSError, match="cannot write the report"):
        write_report(path, report)
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"fidelity": []},
        {"plans": []},
        {"curves": []},
        {"schema_version": 2},
        {"surprise": 1},
        {"fidelity": [{"block": 0, "kl_nats": float("nan")}]},
        {"fidelity": [{"block": -1, "kl_nats": 0.1}]},
    ],
)
def test_data_that_cannot_be_drawn_are_refused(small: dict[str, Any], change: dict[str, Any]) -> None:
    Report.model_validate(small)
    with pytest.raises(ValidationError):
        Report.model_validate({**small, **change})


def test_a_report_cannot_be_changed(report: Report) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report.bitrank_version = "2"


def row(kind: str, tensor_bytes: int, kl_nats: float, text: str = "a text") -> EvaluationRow:
    size = {"bits_per_weight": 3.0, "kl_nats": kl_nats, "total_bytes": tensor_bytes}
    return EvaluationRow.model_validate(evaluation(text, 0.85, kind, kind, size))


def test_uniform_is_interpolated_log_linearly_to_the_plan_s_bytes() -> None:
    plan = row("plan", 150, 0.02)
    others = [row("uniform", 200, 0.01), row("uniform", 100, 0.09), plan]
    assert uniform_kl_at(plan, others) == pytest.approx(0.03)


def test_uniform_at_exactly_the_plan_s_bytes_is_taken_as_measured() -> None:
    plan = row("plan", 200, 0.02)
    assert uniform_kl_at(plan, [row("uniform", 100, 0.09), row("uniform", 200, 0.05)]) == pytest.approx(0.05)


@pytest.mark.parametrize("sizes", [(), (100,), (100, 120), (200, 300)])
def test_uniform_is_never_extrapolated_to_the_plan_s_bytes(sizes: tuple[int, ...]) -> None:
    plan = row("plan", 150, 0.02)
    assert uniform_kl_at(plan, [row("uniform", size, 1 / size) for size in sizes]) is None


def test_uniform_measured_on_another_text_says_nothing_about_the_plan() -> None:
    plan = row("plan", 150, 0.02)
    others = [row("uniform", 100, 0.09, "another"), row("uniform", 200, 0.01, "another")]
    assert uniform_kl_at(plan, others) is None


def test_the_headlines_give_size_loss_gain_and_prediction(report: Report) -> None:
    plan = report.evaluations[0]
    size, loss, gain, prediction = headlines(report)
    assert size.value == f"{report.model.original_bytes / plan.tensor_bytes:.2f}×"
    assert loss.value == f"{plan.kl_nats:.3g}"
    assert (gain.value, gain.name) == ("20%", "less loss than uniform")
    assert (prediction.value, prediction.name) == ("0.85", "predicted ÷ measured")


def test_a_plan_worse_than_uniform_is_called_so(report: Report) -> None:
    plan = report.evaluations[0]
    worse = plan.model_copy(update={"kl_nats": 4 * plan.kl_nats})
    changed = report.model_copy(update={"evaluations": [worse, *report.evaluations[1:]]})
    assert "more loss than uniform" in [headline.name for headline in headlines(changed)]


def test_a_report_without_measurements_has_no_headlines(small: dict[str, Any]) -> None:
    assert headlines(Report.model_validate(small)) == ()


@needs_browser
def test_the_browser_draws_four_charts_with_text_alternatives(report: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    page, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    reader = PageReader(page)
    charts = [a for tag, a in reader.elements if tag == "svg" and a.get("role") == "img"]
    assert len(charts) == reader.tags.count("figure") == 4
    assert all(len(chart.get("aria-label") or "") > 60 for chart in charts)
    assert reader.tags.count("option") == len(report.curves)
    assert "NaN" not in page[page.index("<main>") : page.index('id="report-data"')]


@needs_browser
def test_hostile_text_stays_text_in_the_browser(hostile: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", hostile)
    page, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert "img" not in PageReader(page).tags
    assert f"<title>bitrank report: {html.escape('demo' + HOSTILE, quote=False)}</title>" in page
    shown = page[page.index("<main>") : page.index('id="report-data"')]
    assert html.escape(HOSTILE, quote=False) in shown


@needs_browser
def test_what_a_profile_warns_of_stands_below_its_plan(small: dict[str, Any], tmp_path: Path) -> None:
    warned = {**small["plans"][0], "warnings": [HOSTILE]}
    write_report(tmp_path / "report.html", Report.model_validate({**small, "plans": [warned]}))
    page, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    section = page[page.index('<section id="plan"') : page.index('<section id="evaluations"')]
    assert f'<span class="warning">{html.escape(HOSTILE, quote=False)}</span>' in section
    assert "img" not in PageReader(page).tags


def test_a_plan_without_warnings_is_written_as_before(report: Report) -> None:
    assert all("warnings" not in plan for plan in report.model_dump()["plans"])


@needs_browser
def test_the_smallest_report_is_drawn_without_an_error(small: dict[str, Any], tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", Report.model_validate(small))
    page, console = browse(tmp_path / "report.html", tmp_path / "profile")
    assert console == []
    assert PageReader(page).tags.count("figure") == 4
    hidden = [a["id"] for tag, a in PageReader(page).elements if tag == "section" and "hidden" in a]
    assert hidden == ["evaluations", "samples"]
