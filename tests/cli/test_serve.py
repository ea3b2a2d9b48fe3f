"""`mhconvert serve`, with an interpreter that stands in for an environment with an engine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from tests.conftest import Cli
from tests.convert.export import served_models
from tests.donors import make_checkpoint, make_donor

STAND_IN = '#!/bin/sh\nif [ "$1 $2" = "-I -c" ]; then echo cpu; exit 0; fi\necho "engine $*"\n'
LACKING = "#!/bin/sh\nexit 1\n"


def _script(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """A Python that has every engine, says that vLLM is for CPUs, and prints what it is asked to run."""
    return _script(tmp_path / "python", STAND_IN)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a row that every MLA kernel of vLLM takes."""
    settings = MLASettings(kv_lora_rank=512, qk_rope_head_dim=64, profile="portable")
    path = tmp_path_factory.mktemp("serve") / "tiny"
    return served_models.checkpoint(path, settings=settings, heads=5, kv_heads=5, hidden=80)


def test_the_options_that_vllm_needs_are_there(here: Cli, engine: Path, tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "donor")
    done = here("serve", donor, "--python", engine, "--port", 8123, "--print", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["engine"], found["model"], found["exported"]) == ("vllm", str(donor), False)
    expected = f"{engine} -I -m vllm.entrypoints.cli.main serve {donor} --host 127.0.0.1 --port 8123 --dtype bfloat16"
    assert found["command"][:12] == expected.split()
    assert found["command"][12:] == ["--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}']


def test_a_checkpoint_is_exported_once_and_again_when_it_changes(
    here: Cli, engine: Path, portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("serve", portable, "--engine", "vllm", "--python", engine, "--print", "--json")
    first, second = (json.loads(here(*words).stdout) for _ in range(2))
    assert (first["model"], first["exported"], second["exported"]) == ("tiny-deepseek_v3", True, False)
    assert json.loads((tmp_path / "tiny-deepseek_v3/config.json").read_text())["model_type"] == "deepseek_v3"
    weights = load_file(portable / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, portable / "model.safetensors", {"format": "pt"})
    assert json.loads(here(*words).stdout)["exported"] is True
    os.remove("tiny-deepseek_v3.served.json")  # then nothing says whose export that is
    foreign = here(*words)
    assert (foreign.returncode, foreign.stdout.count("tiny")) == (1, 1)
    assert "is there already; serve it by its name" in foreign.stderr


def test_plans_of_heads_are_served_in_a_class_of_vllms(
    here: Cli, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make_checkpoint(tmp_path / "heads", "dha", DHASettings(kv_budget=0.5, equal_heads=True))
    done = here("serve", made, "--python", engine, "--print", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["engine"], found["exported"]) == ("vllm", True)
    assert Path(found["model"]).name.startswith("heads-")


def test_a_row_that_vllm_refuses_is_not_served_there(here: Cli, engine: Path, tmp_path: Path) -> None:
    narrow = served_models.checkpoint(tmp_path / "narrow")
    assert (
        json.loads(here("serve", narrow, "--python", engine, "--print", "--json").stdout)["engine"]
        == "transformers"
    )
    refused = here("serve", narrow, "--engine", "vllm", "--python", engine, "--print")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "vLLM 0.32 on CPUs would refuse" in refused.stderr


def test_our_own_class_is_for_transformers_alone(here: Cli, engine: Path, tmp_path: Path) -> None:
    """A moh checkpoint has no other form; its code is that of this package, so it may run."""
    moh = make_checkpoint(tmp_path / "moh", "moh", MoHSettings(active=0.5))
    done = here("serve", moh, "--python", engine, "--print", "--json")
    found = json.loads(done.stdout)
    assert found["engine"] == "transformers"
    assert found["command"][-1] == "--trust-remote-code"
    refused = here("serve", moh, "--engine", "vllm", "--python", engine, "--print")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "moh" in refused.stderr


def test_changed_code_needs_trust(here: Cli, engine: Path, tmp_path: Path) -> None:
    moh = make_checkpoint(tmp_path / "moh", "moh", MoHSettings(active=0.5))
    with (moh / "modeling_moh.py").open("a", encoding="utf-8") as file:
        file.write("print('mine')\n")
    words = ("serve", moh, "--engine", "transformers", "--python", engine, "--print")
    refused = here(*words)
    assert refused.returncode == 1
    assert "modeling_moh.py" in refused.stderr
    assert here(*words, "--trust-remote-code").returncode == 0


def test_a_gguf_is_served_by_llama_server(
    here: Cli, tmp_path: Path, portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    missing = here("serve", file, "--print", PATH=str(tmp_path))
    assert missing.returncode == 1
    assert "there is no llama-server on the PATH" in missing.stderr
    _script(tmp_path / "llama-server", STAND_IN)
    found = json.loads(here("serve", file, "--print", "--json", PATH=str(tmp_path)).stdout)
    assert found["command"] == f"llama-server --model {file} --host 127.0.0.1 --port 8000".split()
    wrong = here(
        "serve", file, "--engine", "transformers", "--python", _script(tmp_path / "python", STAND_IN)
    )
    assert "is served by --engine llama-server" in wrong.stderr
    plain = make_donor(tmp_path / "plain")
    folder = here("serve", plain, "--engine", "llama-server", "--print", PATH=str(tmp_path))
    assert (folder.returncode, folder.stdout) == (1, "")
    assert "llama-server reads GGUF files" in folder.stderr


def test_what_cannot_be_served_is_said_before_anything_is_written(
    here: Cli, engine: Path, portable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lacking = _script(tmp_path / "lacking", LACKING)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        faults = {
            ("--engine", "vllm", "--python", lacking): "has not all of vllm; install vllm there",
            ("--python", tmp_path / "nothing"): "cannot be run: No such file or directory",
            (
                "--python",
                engine,
                "--port",
                port,
            ): f"127.0.0.1:{port} cannot be served: Address already in use",
        }
        for words, message in faults.items():
            done = here("serve", portable, *words)
            assert (done.returncode, done.stdout) == (1, ""), words
            assert message in done.stderr
    assert "mhconvert merge" in here("serve", adapter).stderr
    assert "is neither a model folder nor a .gguf file" in here("serve", tmp_path / "missing").stderr
    usage = here("serve", portable, "--dtype", "float16")
    assert usage.returncode == 2
    assert not list(tmp_path.glob("tiny-*"))


def test_the_engine_takes_the_place_of_the_process(cli: Cli, engine: Path, tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "donor")
    done = cli("serve", donor, "--engine", "transformers", "--python", engine, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    command = (
        f"-I -m transformers.cli.transformers serve {donor} --host 127.0.0.1 --port 8000 --dtype float32"
    )
    assert done.stdout.splitlines() == [f"{engine} {command}", f"engine {command}"]
