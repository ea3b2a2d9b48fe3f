"""Adapter folders that are not what their config says, and configs that say nothing: one line that names the fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.errors import AdapterError, CheckpointError, MhconvertError

Saved = Callable[..., tuple[Path, Any]]
Change = Callable[[dict[str, torch.Tensor]], Any]
FIRST = "base_model.model.model.layers.0.mlp.down_proj."


def rewrite(folder: Path, **changes: Any) -> None:
    held = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(held | changes))


def damage(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def both(folder: Path, out: Path) -> list[Callable[[], Any]]:
    return [
        lambda: mhconvert.merge(str(folder), str(out)),
        lambda: mhconvert.export(str(folder), "lora", str(out)),
    ]


def without(part: str) -> Change:
    return lambda t: [t.pop(key) for key in list(t) if part in key]


def flat(t: dict[str, torch.Tensor]) -> None:
    t[FIRST + "hydra_par_A"] = t[FIRST + "hydra_par_A"][0]


def whole_numbers(t: dict[str, torch.Tensor]) -> None:
    t[FIRST + "hydra_par_A"] = t[FIRST + "hydra_par_A"].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.0.self_attn"), r"tensor base_model\S+layers.0\S+o_proj.hydra_par_A is missing from .* asks"),
        (without("hydra_seq"), r"tensor base_model\S+hydra_seq_A is missing from \S+, and the adapter_config"),
        (without("hydra_"), r"tensor base_model\S+layers.0\S+hydra_par_A is missing from|adapts no module"),
        (flat, r"down_proj.hydra_par_A in \S+ has shape \[128\]"),
        (whole_numbers, r"down_proj.hydra_par_A in \S+ is stored as int32; save it as float32"),
    ],
)  # fmt: skip
def test_weights_that_are_not_whole(saved: Saved, tmp_path: Path, change: Change, message: str) -> None:
    folder, _ = saved(modules_to_save=["norm"])
    damage(folder, change)
    for command in both(folder, tmp_path / "out"):
        with pytest.raises(AdapterError, match=message):
            command()
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"r_par": 99}, AdapterError, "hydra_par_A in .* is of rank 4, and the adapter_config.json beside it says 99"),
        ({"r_seq": 0}, AdapterError, "hydra_seq_A in .* is of rank 3, and the adapter_config.json beside it says 0"),
        ({"rank_pattern": {"o_proj": {"r_par": 5}}}, AdapterError, "o_proj.hydra_par_A .* is of rank 4, .* says 5"),
        ({"r_par": 99_999_999_999}, AdapterError, "r_par=99999999999 is not a rank"),
        ({"r_par": "8"}, AdapterError, "r_par='8' is not a rank"),
        ({"target_modules": ["o_proj", "down_proj", "q_proj"]}, AdapterError, r"q_proj.hydra_par_A is missing from"),
        ({"rank_pattern": [1]}, AdapterError, r"rank_pattern=\[1\] is not ranks by module"),
        ({"rank_pattern": {"[": {"r_par": 1}}}, AdapterError, r"rank_pattern '\[' is no regular expression"),
        ({"scale": None}, AdapterError, "scale=None is not a finite number"),
        ({"dropout": "x"}, AdapterError, "dropout='x' is outside"),
        ({"target_modules": 5}, AdapterError, "target_modules=5 is neither"),
        ({"task_type": "WHAT"}, CheckpointError, "adapter_config.json cannot be read: .*WHAT"),
    ],
)  # fmt: skip
def test_configs_that_are_not_of_these_weights(
    saved: Saved, tmp_path: Path, changes: dict[str, Any], kind: Any, message: str
) -> None:
    folder, _ = saved()
    rewrite(folder, **changes)
    for command in both(folder, tmp_path / "out"):
        with pytest.raises(kind, match=message):
            command()


def no_rank(t: dict[str, torch.Tensor]) -> None:
    t |= {key: value[:0] if "lora_A" in key else value[:, :0] for key, value in t.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha=None is not a number"),
        ({"r": 99}, r"lora_A.weight in \S+ is of rank 4, and the adapter_config.json beside it says 99"),
        ({"alpha_pattern": {"[": 3}}, r"alpha_pattern '\[' is no regular expression"),
        ({"alpha_pattern": {"o_proj": "3"}}, r"alpha_pattern\['o_proj'\]='3' is not a number"),
        ({"rank_pattern": [4]}, r"rank_pattern=\[4\] is not numbers by module"),
        ({"target_modules": "["}, r"target_modules '\[' is no regular expression"),
        ({"layers_pattern": "layers"}, "cannot be read: .*layers_to_transform"),
    ],
)
def test_lora_configs(saved_lora: Saved, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder, _ = saved_lora()
    rewrite(folder, **changes)
    with pytest.raises(MhconvertError, match=message):
        mhconvert.merge(str(folder), str(tmp_path / "out"))


def test_a_lora_of_no_rank(saved_lora: Saved, tmp_path: Path) -> None:
    folder, _ = saved_lora()
    damage(folder, no_rank)
    with pytest.raises(AdapterError, match="is of rank 0, and the adapter_config.json beside it says 4"):
        mhconvert.merge(str(folder), str(tmp_path / "out"))


def test_a_revision_beside_a_folder(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, _ = saved()
    rewrite(folder, revision="main")
    assert mhconvert.merge(str(folder), str(tmp_path / "out"))["base"] == str(biased_donor)
    rewrite(folder, base_model_name_or_path="none/such", revision="v2")
    with pytest.raises(MhconvertError, match="none/such@v2|none/such"):
        mhconvert.merge(str(folder), str(tmp_path / "again"))


def test_an_adapter_with_added_tokens(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved()
    damage(folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(328, 64)}))
    words = r"with 328 tokens, and \S+ has 320: tokens were added .* base.resize_token_embeddings\(328\)"
    with pytest.raises(AdapterError, match=words):
        mhconvert.merge(str(folder), str(tmp_path / "out"))
