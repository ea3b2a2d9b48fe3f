"""The reload in a bare process: it finds a sound folder sound, and names what is wrong with another."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mhconvert.convert.bare_process import reload
from mhconvert.convert.bare_process.reload import verify
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.donors import make_donor

REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
{extra}
class OtherConfig(LlamaConfig):
    model_type = "other_llama"
class OtherModel(LlamaForCausalLM):
    config_class = OtherConfig
"""


@pytest.fixture
def whole_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program itself is what is tested here, from its interpreter on."""
    monkeypatch.setattr(reload, "subprocess", subprocess)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("verify") / "tiny", layers=2, kv_heads=2)


@pytest.fixture(scope="module")
def probe(folder: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    input_ids = torch.randint(2, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(input_ids=input_ids).logits
    path = folder.parent / "probe.safetensors"
    save_file({"input_ids": input_ids, "logits": logits.clone()}, path)
    return path


def remote_copy(folder: Path, target: Path, extra: str) -> Path:
    """`folder` with its classes in a file of its own, as a converted checkpoint has them."""
    shutil.copytree(folder, target)
    (target / "modeling_other.py").write_text(REMOTE.format(extra=extra))
    config = json.loads((target / "config.json").read_text())
    config |= {
        "model_type": "other_llama",
        "architectures": ["OtherModel"],
        "auto_map": {
            "AutoConfig": "modeling_other.OtherConfig",
            "AutoModelForCausalLM": "modeling_other.OtherModel",
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.usefixtures("whole_processes")
def test_a_sound_folder(folder: Path, probe: Path) -> None:
    result = verify(folder, probe, prompt="The cache", max_new_tokens=5)
    assert result["largest_logit_difference"] < 1e-4
    assert result["relative_logit_error"] < 1e-5
    assert result["cache"]["elements_per_token"] == 2 * 2 * 2 * 16
    assert result["cache"]["bytes_per_token"] == 4 * 2 * 2 * 2 * 16
    assert result["sample"]["prompt"] == "The cache"
    assert isinstance(result["sample"]["text"], str)
    assert result["parameters"] > 0
    assert result["peak_rss_bytes"] > 50 * 2**20
    assert result["seconds"] > 0


@pytest.mark.usefixtures("whole_processes")
def test_the_folders_own_code_runs(folder: Path, probe: Path, tmp_path: Path) -> None:
    own = remote_copy(folder, tmp_path / "own", "")
    with pytest.raises(UnsupportedError, match="--trust-remote-code allows it"):
        verify(own, probe, prompt="The cache")
    result = verify(own, probe, prompt="The cache", max_new_tokens=3, trusted=True)
    assert result["model_class"] == "OtherModel"
    assert result["module"] == "transformers_modules"


@pytest.mark.usefixtures("whole_processes")
def test_code_that_needs_mhconvert_is_found_out(folder: Path, probe: Path, tmp_path: Path) -> None:
    broken = remote_copy(folder, tmp_path / "needs", "import mhconvert.errors")
    with pytest.raises(CheckpointError, match=r"needs does not load and generate.*mhconvert"):
        verify(broken, probe, prompt="x", trusted=True)


def test_other_weights_are_found_out(folder: Path, probe: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="logits differ"):
        verify(other, probe, prompt="x")


def test_nan_is_found_out(folder: Path, probe: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "nan")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not finite"):
        verify(other, probe, prompt="x")


def test_a_folder_without_weights(folder: Path, probe: Path, tmp_path: Path) -> None:
    empty = shutil.copytree(folder, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="empty does not load"):
        verify(empty, probe, prompt="x")
