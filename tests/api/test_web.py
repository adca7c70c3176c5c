"""The page, in a real browser against a real server process: what a person sees, types, drags and takes away.

Every page opened here must leave the console empty and ask nothing of any other host.
"""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
from road import Road
from service_process import ServiceProcess

from api.settings import Settings
from api.storage.api_keys import KeyStore
from api.storage.database import open_database

sync_api = pytest.importorskip("playwright.sync_api")
Page, expect = sync_api.Page, sync_api.expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH"),
]
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
PLANNED = re.compile("Planned and drawn in")


@pytest.fixture(scope="module")
def other(road: Road, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same measurements as another profile, of a model of another name."""
    folder = tmp_path_factory.mktemp("profiles") / "other"
    shutil.copytree(road.profile, folder)
    document = json.loads((folder / "profile.json").read_text())
    document["model"]["id"] = "other"
    (folder / "profile.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def server(road: Road, other: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two profiles, and a model `fresh` that was never profiled."""
    roots = tmp_path_factory.mktemp("models")
    shutil.copytree(road.model, roots / "fresh")
    arguments = ("--workers", "1", "--profile", other, "--profile", road.profile)
    process = ServiceProcess(tmp_path_factory.mktemp("data"), *arguments, BITRANK_MODEL_ROOTS=str(roots))
    yield process.url
    process.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


class Visit:
    """A tab: its page, and what went to the console and over the network."""

    def __init__(self, browser: Any, **context: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **context)
        self.console: list[str] = []
        self.requests: list[Any] = []
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))

    @property
    def hosts(self) -> set[str]:
        return {urlsplit(r.url).netloc for r in self.requests if not r.url.startswith("blob:")}


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Visit]:
    visit = Visit(browser)
    yield visit
    visit.context.close()
    assert visit.console == []
    assert visit.hosts == {urlsplit(server).netloc}


@pytest.fixture
def page(visit: Visit, server: str) -> Page:
    return opened(visit.page, server)


def opened(page: Page, address: str) -> Page:
    page.goto(address)
    expect(page.locator("#curves svg")).to_be_visible(timeout=20_000)
    expect(page.locator("#budget-hint")).to_have_text(PLANNED)
    return page


def in_address(page: Page, name: str) -> str:
    return parse_qs(urlsplit(page.evaluate("location.href")).query)[name][0]


def described(page: Page, id: str) -> str:
    """What a screen reader says of a chart."""
    return str(page.locator(f"#{id} .plot > svg").get_attribute("aria-label"))


def drag(page: Page, to: float) -> None:
    """Drag the dial to a share of its length, by way of a dozen places."""
    box = page.locator("#slider").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    page.locator("#slider").hover()
    page.mouse.down()
    page.mouse.move(box["x"] + to * box["width"], middle, steps=12)
    page.mouse.up()
    settled(page)


def settled(page: Page) -> None:
    budget = page.locator("#budget").input_value()
    expect(page.locator("#announcement")).to_contain_text(f"Planned {budget}:")


def downloaded(page: Page, button: str) -> str:
    with page.expect_download() as download:
        page.get_by_role("button", name=button, exact=True).click()
    return Path(download.value.path()).read_text(encoding="utf-8")


def test_every_chart_of_the_first_profile_is_drawn(page: Page) -> None:
    for id in ("map", "frontier", "curves", "measured", "fidelity"):
        assert len(described(page, id)) > 60
    assert "NaN" not in page.inner_text("main")
    expect(page.locator("#cards div")).to_have_count(5)


def test_choosing_a_model_shows_its_plan(page: Page) -> None:
    before = in_address(page, "profile")
    page.get_by_role("combobox", name="Model").select_option(index=1)
    expect(page.locator("#planning")).not_to_have_attribute("aria-busy", "true")
    expect(page).to_have_title(re.compile("^(other|profile|model) · bitrank$"))
    page.wait_for_function("before => !location.search.includes(before)", arg=before)
    assert in_address(page, "profile") != before


def test_dragging_replans_all_the_way_and_the_address_follows(page: Page, visit: Visit) -> None:
    before = described(page, "map")
    drag(page, 0.75)
    previews = [r for r in visit.requests if "/preview?" in r.url]
    assert len(previews) > 3
    assert described(page, "map") != before
    assert in_address(page, "budget") == page.locator("#budget").input_value()


def test_a_drag_is_one_step_back(page: Page) -> None:
    first = page.locator("#budget").input_value()
    drag(page, 0.2)
    second = page.locator("#budget").input_value()
    assert second != first
    page.go_back()
    expect(page.locator("#budget")).to_have_value(first)
    page.go_forward()
    expect(page.locator("#budget")).to_have_value(second)


def test_the_frontier_is_a_dial_too(page: Page) -> None:
    chart = page.locator("#frontier .plot > svg")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    before = page.locator("#budget").input_value()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.5 * box["height"], steps=6)
    page.mouse.up()
    settled(page)
    assert page.locator("#budget").input_value() != before
    expect(page.locator("#frontier .chosen circle")).to_have_count(1)


def predicted_kl(page: Page) -> float:
    return float(page.locator("#cards dd").first.inner_text())


def test_embedding_and_head_are_decided_on_where_that_is_ticked(
    page: Page, browser: Any, server: str
) -> None:
    box = page.get_by_role("checkbox", name="Embedding and head too")
    kept_kl = predicted_kl(page)
    box.check()
    expect(page).to_have_url(re.compile("embeddings=true"))
    settled(page)
    expect(page.locator("#cards")).to_contain_text(re.compile(r"embedding and head at \d+"))
    assert predicted_kl(page) <= kept_kl
    assert in_address(page, "embeddings") == "true"
    assert json.loads(downloaded(page, "JSON"))["tables"]
    box.uncheck()
    expect(page).not_to_have_url(re.compile("embeddings"))
    settled(page)
    expect(page.locator("#cards")).not_to_contain_text("embedding")
    box.check()
    expect(page).to_have_url(re.compile("embeddings=true"))
    drag(page, 0.3)
    page.get_by_role("button", name="Keep this plan").click()
    expect(page.locator("#keep")).to_have_text(re.compile("^Kept as"))
    other = Visit(browser)
    opened(other.page, page.evaluate("location.href"))
    expect(other.page.get_by_role("checkbox", name="Embedding and head too")).to_be_checked()
    assert other.page.locator("#cards").inner_text() == page.locator("#cards").inner_text()
    other.context.close()


def test_an_address_restores_model_budget_and_layer(page: Page, browser: Any, server: str) -> None:
    drag(page, 0.6)
    page.get_by_role("combobox", name="Layer").select_option(label="model.layers.1.mlp.down_proj")
    expect(page.locator("#curves .plot > svg")).to_have_attribute("aria-label", re.compile("1.mlp.down_proj"))
    page.wait_for_function("location.search.includes('1.mlp.down_proj')")
    other = Visit(browser)
    opened(other.page, page.evaluate("location.href"))
    assert described(other.page, "map") == described(page, "map")
    assert described(other.page, "curves") == described(page, "curves")
    assert other.page.locator("#cards").inner_text() == page.locator("#cards").inner_text()
    other.context.close()


def test_a_kept_plan_has_an_address_and_is_the_plan_shown(page: Page, browser: Any, server: str) -> None:
    drag(page, 0.3)
    page.get_by_role("button", name="Keep this plan").click()
    expect(page.locator("#keep")).to_have_text(re.compile("^Kept as [0-9a-f]{8}$"))
    kept = page.request.get(f"{server}/v1/plans/{in_address(page, 'plan')}").text()
    other = Visit(browser, accept_downloads=True)
    opened(other.page, page.evaluate("location.href"))
    assert downloaded(other.page, "JSON") == downloaded(page, "JSON") == kept
    other.context.close()


def test_a_typed_budget_of_any_unit_is_planned_and_kept_in_its_unit(page: Page) -> None:
    budget = page.get_by_role("textbox", name="Budget")
    budget.fill("1.1MiB")
    budget.press("Enter")
    settled(page)
    assert in_address(page, "budget") == "1.1MiB"
    drag(page, 0.5)
    assert page.locator("#budget").input_value().endswith("MiB")


@pytest.mark.parametrize(
    ("text", "said"), [("1KiB", "smallest feasible"), ("much", "budget"), ("900%", "original")]
)
def test_a_budget_that_cannot_be_is_explained_and_the_plan_stays(
    browser: Any, server: str, text: str, said: str
) -> None:
    page = opened(Visit(browser).page, server)
    before = described(page, "map")
    page.get_by_role("textbox", name="Budget").fill(text)
    page.get_by_role("textbox", name="Budget").press("Enter")
    expect(page.locator("#budget")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#budget-hint")).to_contain_text(said)
    assert described(page, "map") == before
    page.context.close()


def test_the_keyboard_alone_reaches_the_dial_and_plans(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#budget")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.locator("#slider")).to_be_focused()
    before = float(page.locator("#slider").input_value())
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    settled(page)
    assert float(page.locator("#slider").input_value()) == pytest.approx(before + 0.03)
    assert "bits per weight, KL" in str(page.locator("#slider").get_attribute("aria-valuetext"))


def test_everything_that_can_be_operated_has_a_name(page: Page) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, progress, dialog, [role=img], [role=group]")]
             .filter((node) => !(node.ariaLabel || node.getAttribute("aria-labelledby") || node.labels?.length ||
                                 node.textContent.trim()))
             .map((node) => node.outerHTML)"""
    )
    assert nameless == []


def test_a_cell_of_the_plan_shows_its_layer_s_curve(page: Page) -> None:
    page.locator("#map").scroll_into_view_if_needed()
    cell = page.locator("#map .plot [aria-label=cell] rect").last
    cell.click(force=True)
    expect(page.locator("#curves .plot > svg")).to_have_attribute("aria-label", re.compile(r"layers\.1\."))
    page.wait_for_function("location.search.includes('layers.1.')")
    assert "layers.1." in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_until_told_otherwise(browser: Any, server: str, scheme: str) -> None:
    visit = Visit(browser, color_scheme=scheme)
    page = opened(visit.page, server)
    paper = "getComputedStyle(document.querySelector('#map')).backgroundColor"
    colours = {"light": "rgb(255, 255, 255)", "dark": "rgb(24, 28, 34)"}
    assert page.evaluate(paper) == colours.pop(scheme)
    page.get_by_role("button", name="Dark").click()
    assert [page.evaluate(paper)] == list(colours.values())
    page.reload()
    assert [page.evaluate(paper)] == list(colours.values())
    assert visit.console == []
    visit.context.close()


def test_the_table_downloaded_adds_up_to_the_plan(page: Page) -> None:
    plan = json.loads(downloaded(page, "JSON"))
    rows = list(csv.DictReader(downloaded(page, "CSV").splitlines()))
    assert [row["name"] for row in rows] == list(plan["layers"])
    assert sum(int(row["total_bytes"]) for row in rows) + sum(plan["kept"].values()) == plan["total_bytes"]


@pytest.mark.parametrize("chart", ["plan map", "frontier", "error curves", "predicted against measured"])
def test_a_chart_downloaded_in_the_dark_stands_alone_in_the_light(
    browser: Any, server: str, chart: str
) -> None:
    visit = Visit(browser, color_scheme="dark", accept_downloads=True)
    text = downloaded(opened(visit.page, server), f"Download {chart} as SVG")
    drawing = ElementTree.fromstring(text)
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert drawing.get("color") == "rgb(23, 27, 33)"
    assert not re.search(r"var\(|currentColor|light-dark|url\((?!#)", text)
    visit.context.close()


def test_a_running_job_shows_progress_resumes_its_stream_and_is_cancelled(page: Page, visit: Visit) -> None:
    cut = {"body": "id: 1\nevent: queued\ndata: {}\n\n", "content_type": "text/event-stream"}
    page.route("**/events", lambda route: route.fulfill(**cut), times=1)
    page.get_by_role("button", name="Profile a model").click()
    page.get_by_role("textbox", name="Model").fill("fresh")
    page.keyboard.press("Enter")
    job = page.locator("#job-list li").first
    expect(job).to_contain_text("Profile fresh")
    expect(job.locator(".muted")).to_have_text(re.compile(r"\d+/\d+"), timeout=60_000)
    assert float(job.get_by_role("progressbar").evaluate("node => node.value")) >= 0
    streams = [r for r in visit.requests if r.url.endswith("/events")]
    assert [r.headers.get("last-event-id") for r in streams[:2]] == [None, "1"]
    job.get_by_role("button", name="Cancel").click()
    expect(job.locator(".state")).to_have_text("cancelled", timeout=20_000)


def test_a_service_without_profiles_offers_to_make_one(browser: Any, tmp_path: Path) -> None:
    process = ServiceProcess(tmp_path)
    visit = Visit(browser)
    visit.page.goto(process.url)
    expect(visit.page.get_by_role("heading", name="No model is profiled yet")).to_be_visible()
    visit.page.get_by_role("button", name="Profile the demo model").click()
    expect(visit.page.locator("#job-list")).to_contain_text("Profile demo")
    visit.context.close()
    process.stop()
    assert visit.console == []


def test_a_service_with_keys_asks_for_one_and_keeps_it_in_the_tab(
    browser: Any, road: Road, tmp_path: Path
) -> None:
    _, key = KeyStore(open_database(Settings(data_dir=tmp_path))).create("reader", ("read",))
    process = ServiceProcess(tmp_path, "--profile", road.profile, host="0.0.0.0")
    page = Visit(browser).page
    page.goto(process.url)
    page.locator("#key").fill(key)
    page.keyboard.press("Enter")
    expect(page.locator("#curves svg")).to_be_visible(timeout=20_000)
    opened(page, process.url)
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.get_by_role("button", name="Keep this plan").click()
    expect(page.get_by_role("alert")).to_contain_text("lacks the scope")
    assert key not in page.url
    page.context.close()
    process.stop()


class Document(HTMLParser):
    """The elements of the page as served, before any script runs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_policy_lets_only_the_server_s_own_scripts_run(page: Page, server: str) -> None:
    answer = page.request.get(server)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    elements = Document(answer.text()).elements
    assert all(a["src"].startswith("static/") for tag, a in elements if tag == "script" and a["src"])
    assert [tag for tag, a in elements if tag == "script" and "src" not in a] == []
    assert [name for _, a in elements for name in a if name.startswith("on") or name == "style"] == []
