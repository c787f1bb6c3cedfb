"""The page's numbers are the calculators'; in a browser it works by itself, by keyboard, on a phone, in the dark."""

from __future__ import annotations

import base64
import gzip
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from calculators.fit import verdict
from calculators.hardware import GPUS, find_gpu, platform_of
from quantkit.cli.main import cli
from quantkit.config import ModelConfig
from quantkit.estimate import Estimator, Workload
from quantkit.fit import ceiling
from quantkit.presets import PRESETS
from quantkit.report.html import build_page, grid
from quantkit.report.runs import read_run
from quantkit.schemes import SCHEMES
from tests.checkpoints import tiny_config
from tests.paths import ROOT
from tests.report.synthetic import perplexity_body, record

CONTEXTS = (1024, 2048, 8192, 32768)
MODELS = ("mistral-7b-instruct-v0.2", "tinyllama-1.1b")
SITE = ROOT / "reports" / "index.html"


def few_contexts(config: ModelConfig) -> list[int]:
    return [tokens for tokens in CONTEXTS if tokens <= config.max_context]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    runs = [read_run(record(folder, "perplexity", perplexity_body()))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "contexts", few_contexts)
        patch.setattr(grid, "BATCHES", (1, 4))
        text = build_page([PRESETS[name] for name in MODELS], runs)
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def packed(page: str, name: str) -> str:
    found = re.search(rf'id="packed-{name}">([^<]*)<', page)
    assert found
    return gzip.decompress(base64.b64decode(found[1])).decode()


def sample(data: dict[str, Any], count: int) -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """Yield a model of the page's data, and indices of a cell, at random but always the same."""
    dice = random.Random(5)
    for _ in range(count):
        model = dice.choice(data["models"])
        yield (
            model,
            {
                "scheme": dice.randrange(len(model["schemes"])),
                "kv": dice.randrange(len(data["kv_bits"])),
                "batch": dice.randrange(len(data["batches"])),
                "context": dice.randrange(len(model["contexts"])),
                "gpu": dice.randrange(len(data["gpus"])),
            },
        )


def hold(data: dict[str, Any], model: dict[str, Any], at: dict[str, int]) -> None:
    """Hold one cell of the page's data to the calculators, to the byte."""
    gpu, entry = data["gpus"][at["gpu"]], model["schemes"][at["scheme"]]
    inner = (at["kv"] * len(data["batches"]) + at["batch"]) * len(model["contexts"]) + at["context"]
    outer = at["scheme"] * len(data["kv_bits"]) * len(data["batches"]) * len(model["contexts"]) + inner
    config, platform = PRESETS[model["name"]], platform_of(find_gpu(gpu["name"]))
    estimator = Estimator(config, SCHEMES[entry["name"]], platform=platform)
    batch, kv_bits = data["batches"][at["batch"]], data["kv_bits"][at["kv"]]
    run = Workload(model["contexts"][at["context"]], batch, kv_bits)
    expected = estimator.estimate(run)
    cells = model["cells"][gpu["kind"]]
    assert entry["weights_bytes"] == expected.weights_bytes
    assert model["kv_cache_bytes"][inner] == expected.kv_cache_bytes
    assert cells["activations_bytes"][outer] == expected.activations_bytes
    assert cells["allocator_bytes"][outer] == expected.allocator_bytes
    assert gpu["overhead_bytes"] == expected.overhead_bytes
    read = entry["read_bytes"][at["batch"]] + expected.kv_cache_bytes
    assert batch * gpu["bandwidth_gb_s"] * 1e9 / read == pytest.approx(
        ceiling(estimator, run, gpu["bandwidth_gb_s"]), rel=1e-12
    )


def test_every_number_is_the_calculators(page: Path) -> None:
    data = json.loads(packed(page.read_text(encoding="utf-8"), "data"))["calculator"]
    assert [gpu["name"] for gpu in data["gpus"]] == [gpu.name for gpu in GPUS]
    for model, at in sample(data, 60):
        hold(data, model, at)


def test_contexts_end_where_the_model_does() -> None:
    assert grid.contexts(PRESETS["mistral-7b-instruct-v0.2"]) == [1024 * n for n in range(1, 33)]
    assert grid.contexts(PRESETS["llama-3.1-8b"])[-1] == 131072
    assert grid.contexts(PRESETS["tinyllama-1.1b"]) == [1024, 2048]


def test_a_model_shorter_than_the_first_step_has_its_own_context() -> None:
    short = tiny_config(max_context=512)
    assert grid.contexts(short) == [512]
    (model,) = grid.page_data([short])["models"]
    assert model["contexts"] == [512]
    assert model["cells"][0]["activations_bytes"]


def test_the_committed_page_is_that_of_the_calculators() -> None:
    text = SITE.read_text(encoding="utf-8")
    assets = ROOT / "quantkit" / "report" / "html"
    for name in ("page.css", "page.js"):
        assert (assets / name).read_text(encoding="utf-8") in text, f"{name} has changed: make reports"
    data = json.loads(packed(text, "data"))["calculator"]
    assert data["models"][0]["name"] == "mistral-7b-instruct-v0.2"
    for model, at in sample(data, 25):
        hold(data, model, at)


def test_the_page_asks_for_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text.split('<script type="text/plain"')[0])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to write"),
        (["-o", "out"], "needs RECORDS"),
        (["--model", "llama-2-7b", "x.json", "-o", "out"], "--html"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(cli, ["report", *arguments])
    assert result.exit_code == 2
    assert told in result.output


class Browser:
    """A page in headless Chromium, its complaints and requests noted."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.address = page, path.as_uri()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, fragment: str = "") -> None:
        self.page.goto("about:blank")
        self.page.goto(f"{self.address}#{fragment}")
        self.page.wait_for_function("document.documentElement.dataset.ready === ''")

    def parts(self) -> dict[str, int]:
        """The bytes of each component as shown."""
        rows = self.page.query_selector_all("#parts tbody tr")
        return {row.get_attribute("data-part"): int(row.get_attribute("data-bytes")) for row in rows}

    def total(self) -> int:
        return int(self.page.get_attribute("#total", "data-bytes"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=program,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def browser(chromium: Any, page: Path) -> Iterator[Browser]:
    tab = chromium.new_page(viewport={"width": 1100, "height": 900})
    opened = Browser(tab, page)
    yield opened
    tab.close()
    assert not opened.complaints
    assert {address.split("#")[0] for address in opened.requests} <= {opened.address, "about:blank"}


def estimated(arguments: list[str]) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["estimate", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    (entry,) = json.loads(result.stdout)["estimates"]
    return dict(entry)


def test_choices_show_what_estimate_prints(browser: Browser) -> None:
    browser.open()
    tab = browser.page
    tab.select_option("#model", label="mistral-7b-instruct-v0.2")
    tab.select_option("#scheme", label="nf4")
    tab.select_option("#kv", label="8 bits")
    tab.select_option("#gpu", label="RTX 4060, 7.63 GiB")
    tab.focus("#context")
    tab.keyboard.press("End")
    tab.focus("#batch")
    tab.keyboard.press("ArrowRight")
    entry = estimated(
        ["--scheme", "nf4", "--kv-bits", "8", "--gpu", "RTX 4060", "--context", "32k", "--batch", "4"]
    )
    assert browser.parts() == {
        name: entry[f"{name}_bytes"]
        for name in ("weights", "kv_cache", "activations", "allocator", "overhead")
    }
    assert browser.total() == entry["total_bytes"]
    assert tab.inner_text("#total") == f"{entry['total_bytes'] / 2**30:.2f} GiB"
    assert tab.inner_text("#context-text") == "32k"
    row = tab.query_selector('#gpus tr[data-gpu="RTX 4060"]')
    found = verdict(entry["total_bytes"], find_gpu("RTX 4060").usable_bytes)
    assert (row.get_attribute("data-verdict"), int(row.get_attribute("data-margin"))) == (
        found.word,
        found.margin_bytes,
    )


@pytest.mark.parametrize(("scheme", "context"), [("bf16", 8192), ("int8", 32768)])  # one fits, one tightly
def test_the_smallest_gpu_is_that_of_estimate(browser: Browser, scheme: str, context: int) -> None:
    browser.open(f"model=mistral-7b-instruct-v0.2&scheme={scheme}&context={context}")
    said = CliRunner().invoke(cli, ["estimate", "--scheme", scheme, "--context", str(context)]).stdout
    sentence = said.splitlines()[0].partition("the smallest common card")[2]
    assert browser.page.inner_text("#verdict") == f"the smallest known GPU{sentence.removesuffix('.')}"


def test_the_slider_moves_the_total_and_the_address(browser: Browser) -> None:
    browser.open("model=mistral-7b-instruct-v0.2&scheme=int8&context=1024")
    seen = []
    browser.page.focus("#context")
    for _ in CONTEXTS[1:]:
        seen.append(browser.total())
        browser.page.keyboard.press("ArrowRight")
    assert seen == sorted(set(seen))
    assert "context=32768" in browser.page.url
    assert browser.total() == estimated(["--scheme", "int8", "--context", "32k"])["total_bytes"]


def test_a_link_shows_what_its_sender_saw(browser: Browser) -> None:
    browser.open("model=tinyllama-1.1b&scheme=nf4-dq&kv=4&context=2048&batch=4&gpu=T4&theme=dark")
    arguments = ["tinyllama-1.1b", "--scheme", "nf4-dq", "--kv-bits", "4", "--batch", "4", "--gpu", "T4"]
    total = browser.total()
    assert total == estimated([*arguments, "--context", "2k"])["total_bytes"]
    browser.page.select_option("#batch, #scheme", label="int8")
    address = browser.page.url
    browser.open(address.split("#")[1])
    assert browser.page.url == address
    assert browser.page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_link_with_nonsense_shows_the_page(browser: Browser) -> None:
    browser.open("model=no-such&scheme=%00&context=-5&batch=1e9&gpu=&theme=pink")
    assert browser.total() == estimated(["--scheme", "int4-g128", "--context", "8k"])["total_bytes"]


def test_the_longest_context_is_the_last_that_fits(browser: Browser) -> None:
    browser.open("scheme=int8&gpu=RTX+3080+10GB")
    shown = {
        row.get_attribute("data-gpu"): int(row.get_attribute("data-longest"))
        for row in browser.page.query_selector_all("#gpus tbody tr")
    }
    for gpu in GPUS:
        row = Estimator(PRESETS[MODELS[0]], SCHEMES["int8"], platform=platform_of(gpu))
        fitting = [
            context
            for context in CONTEXTS
            if verdict(row.estimate(Workload(context, 1, 16)).total_bytes, gpu.usable_bytes).word == "fits"
        ]
        assert shown[gpu.name] == max(fitting, default=0), gpu.name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(chromium: Any, page: Path, scheme: str) -> None:
    tab = chromium.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    opened = Browser(tab, page)
    opened.open("gpu=RTX+4090")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    assert tab.locator("#records .chart svg").count() > 0
    assert not opened.complaints
    tab.close()


def test_everything_can_be_reached_by_keyboard(browser: Browser) -> None:
    browser.open()
    order = []
    for _ in range(8):
        browser.page.keyboard.press("Tab")
        order.append(browser.page.evaluate("document.activeElement.id"))
    assert order[:7] == ["theme", "model", "scheme", "kv", "context", "batch", "gpu"]
