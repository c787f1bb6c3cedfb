"""The embedded model: what its card promises, and that its committed record is what `eval` finds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from quantkit.cli.main import cli
from quantkit.embedded import EMBEDDED_MODEL, embedded_path
from quantkit.evaluate.run import Evaluation
from quantkit.evaluate.texts import python_reference
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.loader import load
from quantkit.quantize import quantize
from quantkit.quantize.error import sqnr_db
from quantkit.records import read_record
from quantkit.schemes import SCHEMES
from tests.paths import ROOT

FOLDER = embedded_path(EMBEDDED_MODEL)
assert FOLDER is not None
RECORD = read_record(ROOT / "reports" / "tiny-mistral" / "perplexity.json").body
RESULTS = {result["scheme"]: result for result in RECORD["results"]}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_it_is_a_mistral_of_at_most_16_mb() -> None:
    checkpoint = open_checkpoint(FOLDER)
    config = checkpoint.config
    assert (config.name, config.architecture, config.dtype) == ("tiny-mistral", "mistral", "bf16")
    assert 2 * config.parameters <= 16_000_000
    assert config.n_heads > config.n_kv_heads
    assert not config.tie_embeddings
    assert config.rope_theta == 1e6
    assert config.max_context >= 2048
    for spec in config.tensors:
        assert all(size % 128 == 0 for size in spec.shape), spec.name


def test_transformers_computes_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)
    checkpoint = open_checkpoint(FOLDER)
    text = "The function returns 42 elements;\n\n   see naïve_search() for more."
    ids = checkpoint.tokenizer().encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    ours = load(checkpoint, "fp32")
    batch = torch.tensor([ids])
    logits = ours.logits(ours.forward(batch, ours.new_cache(1, len(ids))))
    with torch.inference_mode():
        expected = theirs(batch).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_quantization_matters() -> None:
    change = {name: result["difference"] for name, result in RESULTS.items()}
    error = {name: result["difference_standard_error"] for name, result in RESULTS.items()}
    assert abs(change["int8"]) <= 1e-3 * RESULTS["bf16"]["perplexity"]
    for name in ("int4-g128", "int4-g64", "int4-g32", "nf4", "nf4-dq"):
        assert change[name] > 10 * error[name], name
        assert change[name] > 10 * abs(change["int8"]), name
    assert change["int4-g128"] > max(change["int4-g64"], change["nf4"], change["nf4-dq"])
    assert abs(change["nf4-dq"] - change["nf4"]) < error["nf4"]


def test_the_error_of_its_weights_is_in_the_order_of_theory() -> None:
    """Of the perplexities only some are: one model gives one rounding, see its card."""
    checkpoint = open_checkpoint(FOLDER)
    means = []
    for name in ("int4-g128", "int4-g64", "nf4", "int4-g32", "int8"):
        found = []
        for spec in checkpoint.config.tensors:
            if "_proj" in spec.name:
                weight = checkpoint.read(spec)
                assert isinstance(weight, torch.Tensor)
                packed = quantize(weight.float(), SCHEMES[name], scale_dtype=torch.bfloat16)
                found.append(sqnr_db(weight.float(), packed))
        means.append(sum(found) / len(found))
    assert means == sorted(means)
    assert all(better - worse > 0.3 for worse, better in itertools.pairwise(means))


def test_the_first_windows_give_what_the_record_says_of_the_whole() -> None:
    """Within three standard errors of what so few windows leave open; differences are narrower."""
    evaluation = Evaluation(open_checkpoint(FOLDER), python_reference(), limit_tokens=8 * 2048)
    plain, int8, int4 = evaluation.run([SCHEMES["int8"], SCHEMES["int4-g128"]])
    whole = RESULTS["bf16"]
    assert abs(plain.score.perplexity - whole["perplexity"]) < 4 * plain.score.standard_error
    assert abs(int8.score.perplexity / plain.score.perplexity - 1) < 1e-3
    ratio = int4.score.perplexity / plain.score.perplexity
    assert ratio == pytest.approx(RESULTS["int4-g128"]["perplexity"] / whole["perplexity"], rel=0.02)


@pytest.mark.slow
def test_the_record_is_what_eval_finds() -> None:
    if python_reference().sha256 != RECORD["protocol"]["sha256"]:
        pytest.skip("this Python's reference is not the text of the record")
    evaluation = Evaluation(open_checkpoint(FOLDER), python_reference())
    found = evaluation.run([SCHEMES[name] for name in RESULTS if name != "bf16"])
    for result in found:
        assert result.score.nll == pytest.approx(RESULTS[result.scheme]["nll"], rel=1e-4), result.scheme


def test_its_card_and_the_readme_show_the_record() -> None:
    table = (ROOT / "reports" / "tiny-mistral" / "tiny-mistral-perplexity.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    for page in (FOLDER / "README.md", ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        for name, result in RESULTS.items():
            assert f"{result['perplexity']:.3f} ± {result['standard_error']:.3f}" in text, (page, name)
    assert len(rows) == 2 + len(RESULTS)


def test_commands_run_on_it_where_no_model_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", out, "--scheme", "nf4")
    assert result.exit_code == 0, result.output
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    )
    named = run("generate", "Tiny-Mistral", "The function", "-n", "8")
    unnamed = run("generate", "The function", "-n", "8")
    assert named.exit_code == unnamed.exit_code == 0
    assert named.stdout == unnamed.stdout


def test_a_forgotten_argument_does_not_become_the_embedded_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("quantize", out, "--scheme", "int8").exit_code == 0
    before = sorted(out.iterdir())
    for arguments in (
        ("quantize", out, "--scheme", "nf4", "--force"),
        ("generate", out),
        ("generate", "x.gguf"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "is a model: name" in result.output
    assert sorted(out.iterdir()) == before
    assert run("generate", "a", "b", "c").exit_code == 2
