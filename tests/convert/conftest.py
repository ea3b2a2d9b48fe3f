"""A tiny donor, a text, and recipes that convert the one with the other; and adapters as peft saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM

from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from tests.convert.methods.hydra.adapted import TARGETS, adapted
from tests.donors import make_donor

LAYERS = 5


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("pipeline") / "tiny", layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = (f"{n} boats came home past the town; {n * n} were counted.\n" for n in range(300))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, **changes: Any) -> Recipe:
        settings = {
            "model": str(donor),
            "method": "mla",
            "settings": MLASettings(kv_budget=0.5, kv_bits="16"),
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "fit_steps": 3,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(output=str(output), **(settings | changes))

    return build


@pytest.fixture(scope="session")
def biased_donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; its attention has biases, its MLP has none."""
    return make_donor(tmp_path_factory.mktemp("biased") / "tiny", attention_bias=True)


@pytest.fixture
def saved(biased_donor: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Saves a random Hydra adapter of `base`; gives its folder and the model with it."""

    def save(base: Path = biased_donor, **settings: Any) -> tuple[Path, Any]:
        if settings.get("bias", "none") != "none" and not hasattr(
            BaseTuner, "_get_learnable_bias_state_dict"
        ):
            pytest.skip("peft saves trained biases from 0.21 on")
        model = adapted(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM", **settings)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", model

    return save


@pytest.fixture
def saved_lora(biased_donor: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """The same with a LoRA."""

    def save(**settings: Any) -> tuple[Path, Any]:
        torch.manual_seed(3)
        chosen: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 6,
            "init_lora_weights": False,
            "target_modules": TARGETS,
        }
        config = LoraConfig(task_type="CAUSAL_LM", **(chosen | settings))
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(biased_donor), config).eval()
        model.save_pretrained(tmp_path / "lora")
        return tmp_path / "lora", model

    return save
