"""Tables hold the records' numbers, a report joins all, and what is no record is refused by name."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import pandas as pd
import pytest

from calculators.units import GIB
from quantkit.errors import OutputError, RecordError
from quantkit.report import build_report, tables
from quantkit.report.runs import EstimateRun, PerplexityRun, read_run
from quantkit.report.style import DPI
from tests.report.synthetic import CONTEXTS, WEIGHTS, estimate, estimate_body, perplexity_body, record


@pytest.fixture
def estimates(tmp_path: Path) -> EstimateRun:
    run = read_run(record(tmp_path, "estimate", estimate_body()))
    assert isinstance(run, EstimateRun)
    return run


@pytest.fixture
def perplexities(tmp_path: Path) -> PerplexityRun:
    run = read_run(record(tmp_path, "perplexity", perplexity_body()))
    assert isinstance(run, PerplexityRun)
    return run


def test_tables_hold_the_records_numbers(estimates: EstimateRun, perplexities: PerplexityRun) -> None:
    rows = estimate_body()["estimates"]
    components = pd.read_csv(io.StringIO(tables.csv(tables.components(estimates))))
    assert components.to_dict("records") == [{k: v for k, v in row.items() if k != "fits"} for row in rows]
    totals = tables.totals(estimates)
    assert {(s, c): totals.loc[s, c] for s in WEIGHTS for c in CONTEXTS} == {
        (row["scheme"], row["context"]): row["total_bytes"] for row in rows
    }
    assert tables.csv(totals).splitlines()[0] == "scheme,1024,2048,4096,8192,16384,32768"
    printed = tables.totals_markdown(estimates).splitlines()
    assert [cell.strip() for cell in printed[2].split("|")[1:-1]] == [
        "bf16",
        *(f"{row['total_bytes'] / GIB:.2f}" for row in rows[:6]),
    ]
    assert len(tables.components_markdown(estimates).splitlines()) == 2 + len(rows)
    results = pd.read_csv(io.StringIO(tables.csv(tables.perplexities(perplexities))))
    assert results.to_dict("records") == perplexity_body()["results"]
    assert (
        "| nf4       | 5.000 ± 0.055 | +0.580 ± 0.005 |  4.15 GiB |  1,234.6 |"
        in tables.perplexities_markdown(perplexities)
    )


def test_a_report_joins_everything(tmp_path: Path) -> None:
    paths = [record(tmp_path, "estimate", estimate_body()), record(tmp_path, "perplexity", perplexity_body())]
    out = tmp_path / "report"
    written = build_report(paths, out)
    assert sorted(written) == sorted(out.iterdir())
    page = (out / "report.md").read_text(encoding="utf-8")
    for path in written[:-1]:
        assert f"]({path.name})" in page or path.name.endswith("perplexity.md")
        if path.suffix == ".png":
            height, width = matplotlib.image.imread(path).shape[:2]
            assert width == 9 * DPI
            assert height > 600
    for said in (
        "mistral-7b-instruct-v0.2",
        "7,241,732,096",
        "prefill chunk: 2,048 tokens",
        "131,072 bytes a token",
        "assumed: a typical driver's context",
        "allocator: expandable \\| segments",
        "sha256 abab",
        "bos: yes",
        "tail: dropped",
        "2025-01-02T03:04:05+00:00",
        "python 3.12.1",
        "[`estimate.json`](<../estimate.json>)",
    ):
        assert said in page


def test_remaking_gives_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    paths = [record(tmp_path, "estimate", estimate_body()), record(tmp_path, "perplexity", perplexity_body())]
    first = {path.name: path.read_bytes() for path in build_report(paths, tmp_path / "report")}
    with matplotlib.rc_context({"font.size": 20, "savefig.transparent": True, "axes.grid": True}):
        again = {path.name: path.read_bytes() for path in build_report(paths, tmp_path / "report")}
        assert matplotlib.rcParams["font.size"] == 20
    assert first == again


def test_records_of_one_model_do_not_clobber_each_other(tmp_path: Path) -> None:
    names = ["one", "two", "three"]
    paths = [record(tmp_path, "perplexity", perplexity_body(model), name) for model, name in zip(
        ["org/Model X", "other/model-x", "$weird|model/"], names, strict=True)]  # fmt: skip
    written = [path.name for path in build_report(paths, tmp_path / "report")]
    assert len(set(written)) == 3 * 3 + 1
    assert {"model-x-perplexity.png", "model-x-perplexity-2.png", "weird-model-perplexity.png"} <= set(
        written
    )


def test_batches_and_kv_widths_get_charts_of_their_own(tmp_path: Path) -> None:
    body = estimate_body()
    body["estimates"] += estimate_body(kv_bits=8, batch=4)["estimates"]
    written = [path.name for path in build_report([record(tmp_path, "estimate", body)], tmp_path / "report")]
    stem = "mistral-7b-instruct-v0.2-estimate"
    assert {f"{stem}-kv16-batch1-memory.png", f"{stem}-kv8-batch4-memory.png", f"{stem}.csv"} <= set(written)


def changed(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the body with the value at `path` set, or removed where the value is `...`."""
    target: Any = body
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in way:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model", ..., "lacks body.model"),
        ("model", 7, "body.model is 7; it must be a text"),
        ("parameters", True, "body.parameters is True"),
        ("parameters_by_role.ffn", "many", "body.parameters_by_role.ffn is 'many'"),
        ("assumptions.kv_layout", ..., "lacks body.assumptions.kv_layout"),
        ("assumptions.overhead.status", ..., "lacks body.assumptions.overhead.status"),
        ("assumptions.overhead", 5, "body.assumptions.overhead is 5; it must be an object"),
        ("estimates", [], "body.estimates is []"),
        ("estimates.3", "x", "body.estimates[3] is 'x', no object"),
        ("estimates.3.weights_bytes", ..., "lacks body.estimates[3].weights_bytes"),
        ("estimates.3.weights_bytes", -1, "a whole number from 0"),
        ("estimates.3.weights_bytes", 2**63, "a whole number from 0 to 2^63 - 1"),
        ("estimates.3.context", 0, "a whole number from 1"),
        ("estimates.3.total_bytes", 5, "body.estimates[3].total_bytes is 5, but its parts add up to"),
        ("estimates.1", estimate("bf16", 1024, 1), "more than once"),
    ],
)
def test_an_estimate_that_lacks_something_is_refused(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    file = record(tmp_path, "estimate", changed(estimate_body(), path, value))
    with pytest.raises(RecordError) as refusal:
        build_report([record(tmp_path, "perplexity", perplexity_body()), file], tmp_path / "report")
    assert said in str(refusal.value)
    assert str(file) in str(refusal.value)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("dtype", ..., "lacks body.dtype"),
        ("protocol.window", ..., "lacks body.protocol.window"),
        ("results.1.perplexity", ..., "lacks body.results[1].perplexity"),
        ("results.1.perplexity", 1e201, "a finite number"),
        ("results.1.perplexity", 0.0, "above 0"),
        pytest.param("results.1.tokens_per_second", 10**400, "a finite number", id="huge"),
        ("results.1.standard_error", -0.1, "at least 0, or null"),
        ("results.1.weights_bytes", 0, "a whole number from 1"),
        ("results.1.scheme", "fp32", "more than once"),
    ],
)
def test_a_perplexity_that_lacks_something_is_refused(
    tmp_path: Path, path: str, value: Any, said: str
) -> None:
    file = record(tmp_path, "perplexity", changed(perplexity_body(), path, value))
    with pytest.raises(RecordError) as refusal:
        read_run(file)
    assert said in str(refusal.value)


def test_numbers_that_are_not_finite_are_refused_where_a_record_has_them(tmp_path: Path) -> None:
    file = record(tmp_path, "perplexity", changed(perplexity_body(), "results.1.perplexity", "here"))
    file.write_text(file.read_text().replace('"here"', "Infinity"))
    with pytest.raises(RecordError, match="a finite number"):
        read_run(file)


@pytest.mark.parametrize("error", [0.0, None])
def test_a_single_window_has_no_error(tmp_path: Path, error: float | None) -> None:
    body = changed(perplexity_body(), "protocol.tokens_scored", 2047)
    for result in body["results"]:
        result |= {"standard_error": error, "difference_standard_error": error}
    run = read_run(record(tmp_path, "perplexity", body))
    assert isinstance(run, PerplexityRun)
    assert {result.bar for result in run.results} == {None}
    assert "±" not in tables.perplexities_markdown(run)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        json.dumps({"format": "another"}),
        json.dumps({"format": "quantkit-record", "version": 99, "kind": "estimate"}),
        json.dumps({"format": "quantkit-record", "version": 1, "kind": "poem"}),
        json.dumps({"format": "quantkit-record", "version": 1, "kind": "estimate"}),
    ],
    ids=["no-json", "a-list", "other-format", "version", "kind", "no-body"],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"record\.json"):
        build_report([path], tmp_path / "report")


def test_a_body_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="body is 5; it must be an object"):
        read_run(record(tmp_path, "estimate", 5))


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = record(tmp_path, "perplexity", perplexity_body()).rename(tmp_path / "report.md")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="one of the records"):
        build_report([path], tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        build_report([record(tmp_path, "perplexity", perplexity_body())], tmp_path / "file")
