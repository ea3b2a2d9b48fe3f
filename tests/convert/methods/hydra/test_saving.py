"""Adapters on disk: peft's and transformers' loaders, processes with and without the import, keys that stay."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from mhconvert.convert.methods.hydra import HydraConfig
from tests.convert.methods.hydra.adapted import adapted, layers, randomise, tokens
from tests.donors import make_donor

KEYS = [  # of a two-layer Llama with one adapter on down_proj and one sequential on o_proj; also in older adapters
    "base_model.model.model.layers.0.mlp.down_proj.hydra_par_A",
    "base_model.model.model.layers.0.mlp.down_proj.hydra_par_B",
    "base_model.model.model.layers.0.mlp.down_proj.hydra_seq_A",
    "base_model.model.model.layers.0.mlp.down_proj.hydra_seq_B",
    "base_model.model.model.layers.0.self_attn.o_proj.hydra_seq_A",
    "base_model.model.model.layers.0.self_attn.o_proj.hydra_seq_B",
    "base_model.model.model.layers.1.mlp.down_proj.hydra_par_A",
    "base_model.model.model.layers.1.mlp.down_proj.hydra_par_B",
    "base_model.model.model.layers.1.mlp.down_proj.hydra_seq_A",
    "base_model.model.model.layers.1.mlp.down_proj.hydra_seq_B",
    "base_model.model.model.layers.1.self_attn.o_proj.hydra_seq_A",
    "base_model.model.model.layers.1.self_attn.o_proj.hydra_seq_B",
]


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def saved(donor: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that `save_pretrained` wrote, and the logits of what was saved."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    patterns = {"o_proj": {"r_par": 0}}
    model = adapted(AutoModelForCausalLM.from_pretrained(donor), task_type="CAUSAL_LM", rank_pattern=patterns)
    model.save_pretrained(folder)
    return folder, model(tokens()).logits.detach()


def keys(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return sorted(file.keys())


def test_the_keys(saved: tuple[Path, Any]) -> None:
    assert keys(saved[0]) == KEYS


def test_the_config(saved: tuple[Path, Any], donor: Path) -> None:
    held = json.loads((saved[0] / "adapter_config.json").read_text())
    expected = {
        "peft_type": "HYDRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(donor),
        "r_par": 4,
        "r_seq": 3,
        "scale": 0.7,
        "rank_pattern": {"o_proj": {"r_par": 0}},
        "target_modules": ["down_proj", "o_proj"],
        "inference_mode": True,
    }
    assert {key: held[key] for key in expected} == expected
    config = PeftConfig.from_pretrained(str(saved[0]))
    assert isinstance(config, HydraConfig)
    assert config.ranks("model.layers.0.self_attn.o_proj") == (0, 3)
    assert config.target_modules == {"down_proj", "o_proj"}


def test_a_config_of_a_later_version_is_read(saved: tuple[Path, Any], tmp_path: Path) -> None:
    held = json.loads((saved[0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(held | {"r_third": 4, "mhconvert_version": "9.0"})
    )
    with pytest.warns(UserWarning, match="r_third"):
        config = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(config, HydraConfig)
    assert config.mhconvert_version == "9.0"


def load_by_peft(donor: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(donor), folder)


def load_with_little_memory(donor: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(donor), folder, low_cpu_mem_usage=True
    )


def load_under_another_name(donor: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(donor), folder, adapter_name="other"
    )


def load_beside_another(donor: Path, folder: Path) -> Any:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(donor), HydraConfig(task_type="CAUSAL_LM"))
    result = model.load_adapter(folder, adapter_name="second")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    model.set_adapter("second")
    return model


def load_by_auto_class(_: Path, folder: Path) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(str(folder))


def load_by_transformers(donor: Path, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(donor)
    model.load_adapter(str(folder))
    return model


def load_the_folder_as_a_model(_: Path, folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "load",
    [
        load_by_peft,
        load_with_little_memory,
        load_under_another_name,
        load_beside_another,
        load_by_auto_class,
        load_by_transformers,
        load_the_folder_as_a_model,
    ],
)
def test_every_loader(load: Any, donor: Path, saved: tuple[Path, Any]) -> None:
    folder, expected = saved
    model = load(donor, folder).eval()
    assert len(layers(model)) == 4
    logits = model(tokens()).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()  # memory may be aligned otherwise
    plain = AutoModelForCausalLM.from_pretrained(donor)(tokens()).logits
    assert (logits - plain).abs().max() > 1e-2 * expected.abs().max()


def test_transformers_own_adapters(donor: Path, tmp_path: Path) -> None:
    """add_adapter, set_adapter, disable_adapters and save_pretrained of a transformers model."""
    model = AutoModelForCausalLM.from_pretrained(donor)
    plain = model(tokens()).logits
    model.add_adapter(HydraConfig(init_weights=False), adapter_name="first")
    model.add_adapter(HydraConfig(init_weights=False), adapter_name="second")
    assert model.active_adapters() == ["second"]
    second = model(tokens()).logits
    model.set_adapter("first")
    first = model(tokens()).logits
    assert not torch.equal(first, second)
    model.disable_adapters()
    assert torch.equal(model(tokens()).logits, plain)
    model.enable_adapters()
    assert torch.equal(model(tokens()).logits, first)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HYDRA"
    again = AutoModelForCausalLM.from_pretrained(donor)
    again.load_adapter(str(tmp_path))
    assert (again(tokens()).logits - first).abs().max() < 1e-5
    model.delete_adapter("second")
    assert torch.equal(model(tokens()).logits, first)


def test_adapters_of_other_names_have_folders_of_their_own(donor: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(donor), HydraConfig(task_type="CAUSAL_LM"))
    model.add_adapter("second", HydraConfig(r_par=2, r_seq=1, task_type="CAUSAL_LM"))
    randomise(model, 5, adapter="second")
    model.set_adapter("second")
    model.eval()
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "second"):
        assert "import mhconvert" in (folder / "README.md").read_text()
    loaded = load_by_peft(donor, tmp_path / "second").eval()
    assert (loaded(tokens()).logits - model(tokens()).logits).abs().max() < 1e-5


def test_the_readme_says_what_to_import_and_what_the_error_means(donor: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(donor), HydraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n")
    assert "\n---\n" in text
    assert "import mhconvert first" in text
    assert "`KeyError: 'HYDRA'` means that the import is missing" in text
    assert f'from_pretrained("{donor}")' in text
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8").count("import mhconvert first") == 1
    HydraConfig().save_pretrained(str(tmp_path / "config-alone"))
    assert "import mhconvert first" in (tmp_path / "config-alone" / "README.md").read_text()


def test_modules_to_save(donor: Path, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(donor),
        HydraConfig(task_type="CAUSAL_LM", modules_to_save=["norm"]),
    )
    randomise(model, 3)
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert "base_model.model.model.norm.weight" in keys(tmp_path)
    loaded = load_by_peft(donor, tmp_path).eval()
    assert (loaded(tokens()).logits - model.eval()(tokens()).logits).abs().max() < 1e-5
    merged = copy.deepcopy(loaded).merge_and_unload()
    assert (merged(tokens()).logits - model(tokens()).logits).abs().max() < 1e-4


LOAD = """
import sys
folder, donor, imported = sys.argv[1:]
if imported:
    import mhconvert
    assert "torch" not in sys.modules and "peft" not in sys.modules
    exec(imported)
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(donor), folder).eval()
ids = torch.load(folder + "/ids.pt")
print("difference", (model(ids).logits - torch.load(folder + "/logits.pt")).abs().max().item())
"""


@pytest.mark.parametrize(
    "statement",
    ["from mhconvert import HydraConfig", "from mhconvert.convert.methods import hydra; hydra.register()"],
)
def test_a_fresh_process_with_the_import(donor: Path, saved: tuple[Path, Any], statement: str) -> None:
    folder, logits = saved
    torch.save(tokens(), folder / "ids.pt")
    torch.save(logits, folder / "logits.pt")
    words = [sys.executable, "-c", LOAD, str(folder), str(donor), statement]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("difference ")[1]) <= 1e-5


def test_a_fresh_process_without_the_import(donor: Path, saved: tuple[Path, Any]) -> None:
    words = [sys.executable, "-c", LOAD, str(saved[0]), str(donor), ""]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "KeyError: 'HYDRA'"  # what the saved README explains
