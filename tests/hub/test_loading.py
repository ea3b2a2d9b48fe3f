"""What was pushed loads back from the stand-in, at its commit; and the command itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mhconvert import api
from mhconvert.convert.methods.hydra.settings import HydraSettings
from mhconvert.convert.open_model import of_model, open_model, recorded_donor
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.hub.push import push
from tests.conftest import Main
from tests.donors import make_donor
from tests.hub.pushing import COMMIT, REPO, files_at, pushed
from tests.hub.stand_in_write_hub import TOKEN, Fault, WriteHub

LOAD = """
import sys
sys.modules["mhconvert"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
place, commit, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(place, revision=commit, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(place, revision=commit)
ids = torch.tensor([tokenizer("The cache holds a latent.")["input_ids"]])
with torch.inference_mode():
    save_file({"ids": ids, "logits": model.eval()(ids).logits}, target)
"""


def in_a_fresh_process(
    hub: WriteHub, tmp_path: Path, *words: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python where only the stand-in is known, with an empty cache."""
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "fresh"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        | environment
        | more,
        timeout=120,
        check=False,
    )


def test_it_loads_back_with_plain_transformers(hub: WriteHub, checkpoint: Path, tmp_path: Path) -> None:
    result = push(checkpoint, REPO)
    later = files_at(hub) | {"config.json": b"broken", "model.safetensors": b"broken"}
    hub.repos[REPO].commit("main", later, "what a pinned revision does not see")
    target = tmp_path / "out.safetensors"
    done = in_a_fresh_process(hub, tmp_path, "-c", LOAD, REPO, result["commit"], str(target))
    assert done.returncode == 0, done.stderr
    found = load_file(target)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(found["ids"]).logits, found["logits"])


def test_our_own_commands_take_it_by_its_name_and_commit(
    hub: WriteHub, checkpoint: Path, main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect, generate, and what eval and bench open; from the pinned commit, not from what came later."""
    (checkpoint / "mhconvert.json").write_text(
        json.dumps({"recipe": {"model": "some/donor", "method": "mla"}})
    )
    result = push(checkpoint, REPO)
    hub.repos[REPO].commit("main", files_at(hub) | {"config.json": b"broken"}, "later")
    reference = f"{REPO}@{result['commit']}"
    stored = json.dumps(api.inspect(str(checkpoint)))
    assert api.inspect(reference) == json.loads(stored.replace(str(checkpoint), reference))
    assert not any("model.safetensors" in str(request) for request in hub.requests[-8:])
    there, here = open_model(reference, device="cpu"), open_model(str(checkpoint), device="cpu")
    assert of_model(there) == of_model(here)
    assert recorded_donor(reference) == "some/donor"
    ids = torch.arange(2, 18)[None]
    with torch.inference_mode():
        assert torch.equal(there.model()(ids).logits, here.model()(ids).logits)
    assert main("generate", reference, "The cache", "--max-new-tokens", 4, "--device", "cpu", "--json") == 0
    written = json.loads(capsys.readouterr().out)["text"]
    assert main("generate", checkpoint, "The cache", "--max-new-tokens", 4, "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == written


def test_a_pushed_donor_can_be_converted_from_its_commit(hub: WriteHub, tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "donor")
    result = push(folder, "tester/donor")
    hub.repos["tester/donor"].commit("main", {"config.json": b"broken"}, "later")
    script = (
        "import sys; from mhconvert.convert.donor.donor import open_donor\n"
        "from safetensors.torch import save_file\n"
    )
    script += "donor = open_donor(sys.argv[1]); source = donor.source\n"
    script += "save_file({name: source.read(name) for name in source.names()}, sys.argv[2])"
    target = tmp_path / "out.safetensors"
    done = in_a_fresh_process(hub, tmp_path, "-c", script, f"tester/donor@{result['commit']}", str(target))
    assert done.returncode == 0, done.stderr
    found, expected = load_file(target), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def adapter_of(donor: Path, folder: Path) -> Path:
    """A Hydra adapter that changes what the donor computes."""
    recipe = Recipe(model=str(donor), method="hydra", settings=HydraSettings(), output=str(folder))
    api.convert(recipe)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    trained = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
    save_file(trained, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


LOAD_ADAPTER = """
import sys
import torch
from safetensors.torch import save_file
from mhconvert import HydraConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, place, commit, target = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place, revision=commit)
ids = torch.arange(2, 18)[None]
with torch.inference_mode():
    save_file({"logits": model.eval()(ids).logits}, target)
"""


def test_an_adapter_loads_back(hub: WriteHub, tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "donor")
    folder = adapter_of(donor, tmp_path / "tiny-hydra")
    result = push(folder, "tester/tiny-hydra")
    assert files_at(hub, "tester/tiny-hydra").keys() == {path.name for path in folder.iterdir()}
    target = tmp_path / "out.safetensors"
    words = [str(donor), "tester/tiny-hydra", result["commit"], str(target)]
    done = in_a_fresh_process(hub, tmp_path, "-c", LOAD_ADAPTER, *words)
    assert done.returncode == 0, done.stderr
    plain: Any = AutoModelForCausalLM.from_pretrained(donor)
    ids = torch.arange(2, 18)[None]
    with torch.inference_mode():
        base = plain.eval()(ids).logits
        expected = PeftModel.from_pretrained(plain, str(folder)).eval()(ids).logits
    logits = load_file(target)["logits"]
    assert torch.equal(logits, expected)
    assert (logits - base).abs().max() > 0.1


def test_the_command(main: Main, hub: WriteHub, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("push", checkpoint, REPO, "--dry-run") == 0
    assert "14 files, " in capsys.readouterr().out
    assert hub.requests == []
    assert main("push", checkpoint, REPO, "--private", "--message", "first", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["repo"], result["private"], result["commit"]) == (
        REPO,
        True,
        hub.repos[REPO].branches["main"],
    )
    assert hub.repos[REPO].messages[-1] == "first"
    assert main("push", checkpoint, REPO, "--revision", "v2", "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{hub.endpoint}/{REPO}/tree/v2\n", "")
    assert main("push", checkpoint, "a/b/c") == 1
    assert capsys.readouterr().err.startswith("mhconvert: 'a/b/c' is not a repository's name")


def test_the_token_is_in_no_log(hub: WriteHub, converted: Path, tmp_path: Path) -> None:
    """With everything that --debug shows, and the traceback of a push that failed at its end."""
    hub.faults.append(Fault(COMMIT, 403))
    words = ["-m", "mhconvert.cli.main", "push", str(converted), REPO, "--debug", "--json"]
    done = in_a_fresh_process(hub, tmp_path, *words)
    assert (done.returncode, hub.count("PUT /blob/"), pushed(hub)) == (1, 1, 0)
    assert "may not write" in json.loads(done.stdout)["error"]
    assert "repos/create" in done.stderr  # the log is there
    assert "Traceback" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
