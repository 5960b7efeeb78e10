"""The page in a browser: drawn without an error, values on pointing, zoom, legend, selection, phone, dark, speed."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.record import RunSummary, summarize_all
from pipeline.tracking.report.data import MAX_POINTS, notes, page_data, thin
from pipeline.tracking.report.page import render, script_json
from tests.conftest import missing
from tests.tracking.made_runs import rising, write_run
from tests.tracking.test_compare import invoke

VALUES = {"a0": [0.3, 0.6, 0.812], "a1": [0.3, 0.62, 0.818], "b0": [0.2, 0.5, 0.79], "b1": [0.2, 0.55, 0.801]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings of two seeds, and a run whose name and setting would end the page if they were not escaped."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    for name, top1 in VALUES.items():
        lr = 0.1 if name.startswith("a") else 0.2
        write_run(folder / name, top1, seed=int(name[1]), settings={"optim.lr": lr})
    write_run(
        folder / "<b>&amp;'\"", [0.7], settings={"optim.lr": "</script><script>alert(1)</script><!--"}, status=None
    )
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[RunSummary]:
    return summarize_all([folder])[0]


def test_data_of_the_page(runs: list[RunSummary]) -> None:
    data = page_data(runs, "top1", 2.0, [])
    assert [key["title"] for key in data["keys"]] == ["seed", "lr"]
    run = next(run for run in data["runs"] if run["label"] == "a1")
    assert (run["final"]["top1"], run["best"]["loss"], run["cost"]) == (0.818, 1.182, pytest.approx(4.8))
    assert run["evals"]["samples"] == [102_400, 204_800, 307_200]
    assert {row["label"] for row in data["published"]} >= {"NesT-T", "HVT-S-4 (Scale HVT-Ti-4)", "Refiner-ViT-L 448 px"}
    assert page_data(runs, "loss", None, [])["published"] == []
    assert notes(runs) == ["Not at their planned end (1 killed) and so left out of the statistics over seeds."]


def test_nothing_in_the_data_ends_its_script(runs: list[RunSummary]) -> None:
    page = render(runs, "top1", None, ["</script>"])
    (inside,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in inside and json.loads(inside)["leftOut"] == ["</script>"]
    assert script_json({"x": float("0.5"), "y": "<&>"}) == '{"x":0.5,"y":"\\u003c\\u0026\\u003e"}'


def test_thinned_curves_keep_their_extremes() -> None:
    rng = random.Random(0)
    loss: list[float | None] = [rng.random() for _ in range(10_000)]
    loss[4321], loss[77], loss[5000] = 50.0, -1.0, None
    columns = thin({"step": list(range(10_000)), "loss": loss}, "loss")
    assert len(columns["step"]) <= MAX_POINTS and columns["step"] == sorted(columns["step"])  # type: ignore[type-var]
    assert {50.0, -1.0} <= set(columns["loss"])
    assert (columns["step"][0], columns["step"][-1]) == (0, 9999)
    short = {"step": [1.0, 2.0], "loss": [0.5, None]}
    assert thin(short, "loss") is short


# ---------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    binary = shutil.which("chromium")
    if binary is None:
        missing("tests in a browser left out: install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in a context of its own that collects what the browser complains about."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith("file:") or self.complaints.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=30_000)

    def pixels(self, plot: str) -> dict[str, int]:
        """How many pixels of a plot's canvas have which colour, the background left out."""
        return self.page.evaluate(
            """(name) => {
              const canvas = document.querySelector(`[data-name=${name}] canvas`);
              const { width, height } = canvas;
              const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
              copy.drawImage(canvas, 0, 0);
              const { data } = copy.getImageData(0, 0, width, height);
              const found = {};
              for (let i = 0; i < data.length; i += 4) {
                if (data[i + 3] < 255) continue;
                const colour = `${data[i]},${data[i + 1]},${data[i + 2]}`;
                found[colour] = (found[colour] ?? 0) + 1;
              }
              return found;
            }""",
            plot,
        )

    def range(self, plot: str) -> tuple[float, ...]:
        """Lowest and highest x and y of a plot's axes."""
        data = self.page.evaluate("(name) => ({...document.querySelector(`[data-name=${name}]`).dataset})", plot)
        return tuple(float(data[key]) for key in ("xlow", "xhigh", "ylow", "yhigh"))

    def place(self, plot: str, x: float, y: float) -> tuple[float, float]:
        """Where a point lies on the screen; plots have margins of 26 pixels above, 42 below and 14 on the right."""
        box = self.page.locator(f"[data-name={plot}]").bounding_box()
        x0, x1, y0, y1 = self.range(plot)
        left = 34
        right, bottom = box["width"] - 14, box["height"] - 42
        return (
            box["x"] + left + (x - x0) / (x1 - x0) * (right - left),
            box["y"] + bottom + (y - y0) / (y1 - y0) * (26 - bottom),
        )

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@pytest.fixture
def opened(chromium: Any, folder: Path, tmp_path: Path) -> Iterator[Opened]:
    file = tmp_path / "report.html"
    assert invoke(str(folder), "--html", str(file)) == ""
    opened = Opened(chromium, file)
    opened.page.locator("[data-name=curves]").scroll_into_view_if_needed()
    yield opened
    assert opened.complaints == []
    opened.context.close()


BLUE, ORANGE = "36,99,196", "217,98,11"


@pytest.mark.browser
def test_plots_are_drawn_and_names_stay_text(opened: Opened) -> None:
    pixels = opened.pixels("curves")
    assert pixels[BLUE] > 0 and pixels[ORANGE] > 100
    assert sum(opened.pixels("pareto").values()) > 1000
    assert opened.page.locator("#parallel path").count() == 5
    assert opened.page.locator("#runs tbody tr").count() == 5
    assert opened.page.locator("#runs tbody th", has_text="<b>&amp;'\"").count() == 1
    assert opened.page.locator("b", has_text="alert").count() == 0


@pytest.mark.browser
def test_pointing_shows_the_exact_values(opened: Opened) -> None:
    opened.page.mouse.move(*opened.place("curves", 2, 62))
    tip = opened.page.locator("[data-name=curves] .tip").inner_text().splitlines()
    assert tip == ["a1", "top-1 %: 62", "epochs: 2", "step 200"]
    assert opened.page.locator("#runs tr.pointed th").inner_text().strip() == "a1"
    opened.page.locator("#curves select").nth(1).select_option("flops")
    opened.settle()
    opened.page.mouse.move(*opened.place("curves", 6 * 5_807_152_128 * 307_200, 81.2))
    tip = opened.page.locator("[data-name=curves] .tip").inner_text().splitlines()
    assert tip == ["a0", "top-1 %: 81.2", "training FLOPs: 10.704P", "step 300"]


@pytest.mark.browser
def test_a_name_in_the_legend_hides_its_run(opened: Opened) -> None:
    before = opened.pixels("curves")
    name = opened.page.locator("#curves .entry", has_text="a0")
    name.click()
    opened.settle()
    assert name.get_attribute("aria-pressed") == "false"
    after = opened.pixels("curves")
    assert before[ORANGE] > 100 and after.get(ORANGE, 0) == 0 and after[BLUE] == before[BLUE]
    assert not opened.page.locator("#runs tr", has_text="a0").locator("input").is_checked()
    name.click()
    opened.settle()
    assert opened.pixels("curves") == before


@pytest.mark.browser
def test_dragging_zooms_and_a_double_click_goes_back(opened: Opened) -> None:
    whole = opened.range("curves")
    mouse = opened.page.mouse
    mouse.move(*opened.place("curves", 1.5, 50))
    mouse.down()
    mouse.move(*opened.place("curves", 2.0, 70), steps=4)
    mouse.move(*opened.place("curves", 2.5, 80), steps=4)
    mouse.up()
    assert opened.range("curves") == pytest.approx((1.5, 2.5, 50, 80), rel=0.01)
    assert opened.page.locator("[data-name=curves] .reset").is_visible()
    mouse.dblclick(*opened.place("curves", 2.0, 60))
    assert opened.range("curves") == whole
    # Along one axis the other one stays.
    mouse.move(*opened.place("curves", 1.5, 50))
    mouse.down()
    mouse.move(*opened.place("curves", 2.5, 50), steps=4)
    mouse.up()
    assert opened.range("curves") == pytest.approx((1.5, 2.5, *whole[2:]), rel=0.01)


@pytest.mark.browser
def test_seeds_are_drawn_and_compared(opened: Opened) -> None:
    opened.page.locator("#curves select").nth(3).select_option("seeds")
    opened.settle()
    assert opened.page.locator("[data-name=curves]").get_attribute("data-series") == "3"
    opened.page.mouse.move(*opened.place("curves", 3, 81.5))
    tip = opened.page.locator("[data-name=curves] .tip").inner_text().splitlines()
    assert tip == ["lr=0.1", "top-1 %: 81.5 ± 0.424 (n = 2)", "epochs: 3"]
    rows = [row.split("\t") for row in opened.page.locator("#seeds tbody").inner_text().splitlines()]
    assert ["lr=0.1", "2", "81.50 ± 0.42", "81.50 ± 0.42", "reference", "–"] in rows
    assert any(row[:3] == ["lr=0.2", "2", "79.55 ± 0.78"] and row[4].startswith("-1.95 [") for row in rows)


@pytest.mark.browser
def test_a_drag_along_an_axis_selects_runs_everywhere(opened: Opened) -> None:
    axis = opened.page.locator("#parallel [data-axis=result]")
    axis.scroll_into_view_if_needed()
    box = axis.bounding_box()
    middle = box["x"] + box["width"] / 2
    opened.page.mouse.move(middle, box["y"] + 4)
    opened.page.mouse.down()
    opened.page.mouse.move(middle, box["y"] + 0.15 * box["height"], steps=3)
    opened.page.mouse.up()
    opened.settle()
    assert opened.page.locator("#parallel .told").inner_text() == "2 of 5 runs shown"
    assert opened.page.locator("[data-name=curves]").get_attribute("data-series") == "2"
    opened.page.get_by_text("clear selection").click()
    opened.settle()
    assert opened.page.locator("[data-name=curves]").get_attribute("data-series") == "5"


@pytest.mark.browser
def test_a_heading_sorts_and_the_field_finds(opened: Opened) -> None:
    names = opened.page.locator("#runs tbody th")
    opened.page.get_by_role("button", name="best", exact=True).first.click()
    assert [name.strip() for name in names.all_inner_texts()][:2] == ["a1", "a0"]
    opened.page.get_by_placeholder("find").fill("lr=0.2 finished")
    assert opened.page.locator("#runs tbody tr:visible").count() == 2
    opened.page.get_by_text("only those found").click()
    opened.settle()
    assert opened.page.locator("[data-name=curves]").get_attribute("data-series") == "2"


@pytest.mark.browser
def test_published_figures_are_drawn_and_said_to_be(opened: Opened) -> None:
    series = opened.page.locator("[data-name=pareto]")
    series.scroll_into_view_if_needed()
    count = int(str(series.get_attribute("data-series")))
    opened.page.locator("#pareto label", has_text="published").click()
    opened.settle()
    assert int(str(series.get_attribute("data-series"))) == count - 1


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_dark_mode(chromium: Any, folder: Path, tmp_path: Path, scheme: str) -> None:
    file = tmp_path / "report.html"
    invoke(str(folder), "--html", str(file))
    opened = Opened(chromium, file, width=390, color_scheme=scheme, has_touch=True, is_mobile=True)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    colour = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == {"light": "rgb(244, 245, 247)", "dark": "rgb(17, 20, 24)"}[scheme]
    assert (
        opened.page.evaluate(
            "Math.min(...[...document.querySelectorAll('p, td, select, button')].map("
            "(node) => parseFloat(getComputedStyle(node).fontSize)))"
        )
        >= 12
    )
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.browser
def test_a_tap_shows_values_and_they_stay(chromium: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    invoke(str(folder), "--html", str(file))
    opened = Opened(chromium, file, width=390, has_touch=True, is_mobile=True)
    opened.page.locator("[data-name=curves]").scroll_into_view_if_needed()
    opened.page.touchscreen.tap(*opened.place("curves", 2, 60))
    opened.settle()
    tip = opened.page.locator("[data-name=curves] .tip")
    assert tip.inner_text().splitlines()[:2] == ["a0", "top-1 %: 60"]
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.browser
@pytest.mark.parametrize("odd", ["one run", "nothing measured", "not finite", "other metric"])
def test_odd_runs_are_drawn_without_an_error(chromium: Any, tmp_path: Path, odd: str) -> None:
    if odd != "nothing measured":
        write_run(tmp_path / "runs" / "a", [0.5, math.nan if odd == "not finite" else 0.6])
    if odd != "one run":
        for name in ("b", "c"):
            write_run(tmp_path / "runs" / name, [], status=None, settings={"optim.lr": name})
    file = tmp_path / "report.html"
    invoke(str(tmp_path / "runs"), "--html", str(file), *(["--metric", "loss"] if odd == "other metric" else []))
    opened = Opened(chromium, file)
    assert opened.page.locator("#runs tbody tr").count() == {"one run": 1, "nothing measured": 2}.get(odd, 3)
    assert ("Nothing measured yet: b, c." in opened.page.locator("#notes").inner_text()) == (odd != "one run")
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.browser
def test_a_sweep_of_200_runs_of_300_points_opens_in_3_seconds(chromium: Any, tmp_path: Path) -> None:
    rng = random.Random(1)
    for i in range(200):
        settings = {"optim.lr": 10 ** rng.uniform(-4, -2), "optim.weight_decay": rng.choice([0.0, 0.05])}
        write_run(tmp_path / "sweep" / f"t{i:03d}", rising(rng.uniform(0.6, 0.83), 300), settings=settings)
    file = tmp_path / "sweep.html"
    invoke(str(tmp_path / "sweep"), "--html", str(file))
    began = time.monotonic()
    opened = Opened(chromium, file)
    seconds = time.monotonic() - began
    assert opened.page.locator("[data-name=curves]").get_attribute("data-series") == "200"
    assert opened.complaints == []
    opened.context.close()
    assert seconds < 3
