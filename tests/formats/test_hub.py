"""Models on the Hub, through the real client, from a server of our own that has a few checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from quantkit.cli import options
from quantkit.cli.main import cli
from quantkit.config import read_json
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.checkpoint import open_checkpoint
from quantkit.formats.hub import HubCheckpoint
from quantkit.formats.huggingface import INDEX
from quantkit.formats.safetensors import Entry, SafetensorsFile
from quantkit.quantize.convert import convert
from quantkit.schemes import SCHEMES
from tests.checkpoints import tiny_config, write_checkpoint

COMMIT = "0" * 40


class Hub:
    """Repositories as folders `root/owner/name`; `asked` lists the bytes each GET was answered with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, int]] = []
        self.refused: dict[str, tuple[int, str]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
                repo, name = match.groups() if match else ("", "")
                path = hub.root / repo / name
                if repo in hub.refused:
                    self.refuse(*hub.refused[repo])
                elif not (hub.root / repo).is_dir():
                    self.refuse(404, "RepoNotFound")
                elif not path.is_file():
                    self.refuse(404, "EntryNotFound")
                else:
                    self.give(repo, path, body)

            def refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def give(self, repo: str, path: Path, body: bool) -> None:
                data = path.read_bytes()
                size = len(data)
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if wanted:
                    data = data[int(wanted[1]) : int(wanted[2]) + 1]
                self.send_response(206 if wanted else 200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{repo.replace("/", "-")}-{path.name}-{size}"')
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    hub.asked.append((path.name, len(data)))
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo: str, directory: Path) -> Path:
        """Serve a copy of a model directory, and return it."""
        return Path(shutil.copytree(directory, self.root / repo))


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never ask the real Hub."""
    point_at("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def hub(tmp_path: Path, nowhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub(tmp_path / "served")
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(served.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.chdir(tmp_path)
    yield served
    huggingface_hub.close_session()
    served.server.shutdown()
    served.server.server_close()
    thread.join()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "plain", tiny_config(), "bf16", seed=0)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments])


def body(*arguments: str) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_model_is_what_it_is_locally(hub: Hub, plain: Path) -> None:
    hub.add("someone/Tiny-1.0", plain)
    args = ("--context", "64", "--context", "1k")
    found, local = body("estimate", "someone/Tiny-1.0", *args), body("estimate", str(plain), *args)
    assert found["model"] == "Tiny-1.0"
    assert found["estimates"] == local["estimates"]
    assert body("inspect", "someone/Tiny-1.0")["stored_bytes"] == open_checkpoint(plain).stored_bytes


def test_no_weights_are_read(hub: Hub, tmp_path: Path) -> None:
    config = tiny_config(vocab_size=4096, hidden_size=256)
    weights = (
        hub.add("a/b", write_checkpoint(tmp_path / "model", config, "bf16", seed=0)) / "model.safetensors"
    )
    body("estimate", "a/b", "--context", "64")
    read = sum(size for name, size in hub.asked if name == "model.safetensors")
    assert 0 < read <= 100_001 < weights.stat().st_size / 10


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "nf4", "nf4-dq"])
def test_quantized_models_come_as_stored(hub: Hub, plain: Path, tmp_path: Path, scheme: str) -> None:
    out = tmp_path / "quantized"
    assert run("quantize", str(plain), str(out), "--scheme", scheme).exit_code == 0
    hub.add("a/quantized", out)
    found = body("estimate", "a/quantized", "--context", "64")["estimates"]
    assert found[0]["scheme"] == "as-stored"
    assert found == body("estimate", str(out), "--context", "64")["estimates"]
    assert options.find_model("a/quantized").schemes == open_checkpoint(out).schemes


@pytest.mark.parametrize(
    ("blocks", "block"), [(512, 64), (1024, 32), (8, 4096), (511, None), (513, None), (0, None)]
)
def test_a_block_size_is_one_that_bitsandbytes_has(
    blocks: int, block: int | None, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "quantized"
    convert(open_checkpoint(plain), out, SCHEMES["nf4"])
    raw, entries = read_json(out / "config.json"), dict(SafetensorsFile(out / "model.safetensors").entries)
    name = "model.layers.0.mlp.down_proj.weight"
    entries[f"{name}.absmax"] = Entry("F32", (blocks,), 0, 4 * blocks)
    if block is None:
        with pytest.raises(CheckpointError, match=f"{name}.absmax has {blocks} elements; no block size"):
            HubCheckpoint("a/b", tiny_config(), raw, entries)
    else:
        assert HubCheckpoint("a/b", tiny_config(), raw, entries).schemes[name].group == block


def split(directory: Path) -> dict[str, str]:
    """Split a model's one file in two, and return the weight map of the index written beside them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for index in range(2):
        file, names = f"model-{index + 1}-of-2.safetensors", sorted(tensors)[index::2]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_shards_are_joined(hub: Hub, plain: Path) -> None:
    directory = hub.add("a/sharded", plain)
    weight_map = split(directory)
    result = run("estimate", "a/sharded", "--context", "64")
    assert (result.exit_code, result.stderr) == (0, "")
    found = options.find_model("a/sharded").checkpoint
    assert found is not None
    assert found.stored_bytes == open_checkpoint(plain).stored_bytes
    weight_map["no.such.tensor"] = next(iter(weight_map.values()))
    lying = hub.add("a/lying", directory)
    (lying / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"a/lying: the index says that no.such.tensor lies in model-"):
        options.find_model("a/lying")


def test_tensors_that_contradict_the_config_are_refused(hub: Hub, plain: Path) -> None:
    directory = hub.add("a/wrong", plain)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "num_hidden_layers": 3}))
    result = run("estimate", "a/wrong")
    assert isinstance(result.exception, CheckpointError)
    assert "a/wrong: the tensor model.layers.2.input_layernorm.weight is missing" in str(result.exception)


def test_without_safetensors_the_config_alone_is_used(hub: Hub, plain: Path) -> None:
    directory = hub.add("a/pickled", plain)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    result = run("estimate", "a/pickled", "--context", "64")
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: a/pickled has no safetensors on the Hub")
    assert result.stderr.count("\n") == 1


def test_an_unknown_architecture_is_refused_by_name(hub: Hub, plain: Path) -> None:
    directory = hub.add("a/other", plain)
    (directory / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(
        ConfigError, match=r"a/other/config.json: unknown architecture MambaForCausalLM; known are"
    ):
        options.find_model("a/other")


def test_a_broken_header_is_one_line(hub: Hub, plain: Path) -> None:
    (hub.add("a/broken", plain) / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"no JSON, at all!")
    with pytest.raises(CheckpointError, match="a/broken on the Hub has a broken safetensors header"):
        options.find_model("a/broken")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((401, "RepoNotFound"), "neither a path here nor a model on the Hub that can be seen"),
        ((403, "GatedRepo"), "a/b is gated: accept its terms at https://huggingface.co/a/b and set HF_TOKEN"),
        ((404, "EntryNotFound"), "has no config.json"),
        ((500, ""), "the Hub cannot be asked"),
    ],
)
def test_refusals_are_one_line(hub: Hub, plain: Path, refusal: tuple[int, str], said: str) -> None:
    hub.add("a/b", plain)
    hub.refused["a/b"] = refusal
    result = run("estimate", "a/b")
    assert isinstance(result.exception, CheckpointError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_missing_repository_is_one_line(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no/such is neither a path here"):
        options.find_model("no/such")


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"the Hub cannot be asked .*: name a local model or a preset"):
        options.find_model("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"the Hub cannot be asked \(HF_HUB_OFFLINE is set\)"):
        options.find_model("a/b")


@pytest.mark.parametrize("name", ["dir/model.gguf", "./a/b", "a/b/c", "gpt-5", "/a/b", "a/"])
def test_other_names_are_never_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown model"):
        options.find_model(name)


def test_weights_and_tokenizer_are_refused(hub: Hub, plain: Path) -> None:
    hub.add("a/b", plain)
    checkpoint = options.find_model("a/b").checkpoint
    assert checkpoint is not None
    for use in (checkpoint.tokenizer, lambda: checkpoint.read(checkpoint.config.tensors[0])):
        with pytest.raises(CheckpointError, match="a/b is on the Hub: download it"):
            use()
