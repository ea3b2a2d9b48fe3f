"""What `merge` writes, and where it may: dtypes, licences, and folders that it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mhconvert
from mhconvert.convert.methods.hydra.branches import merged_weight
from mhconvert.errors import AdapterError, OutputError
from tests.convert.methods.hydra.adapted import adapted, layers
from tests.donors import make_donor

Saved = Callable[..., tuple[Path, Any]]
CHANGED = "model.layers.0.mlp.down_proj.weight"


def written(folder: Path, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    mhconvert.merge(str(folder), str(out), **options)
    return load_file(out / "model.safetensors")


def test_tensors_stay_as_stored(saved: Saved, tmp_path: Path) -> None:
    base = make_donor(tmp_path / "mixed", dtype=torch.bfloat16)
    stored = load_file(base / "model.safetensors")
    stored |= {name: t.float() + 1e-4 for name, t in stored.items() if "norm" in name}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    folder, _ = saved(base)
    found = written(folder, tmp_path / "out")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in stored.items()}
    assert {t.dtype for t in found.values()} == {torch.float32, torch.bfloat16}
    same = {name for name in stored if torch.equal(found[name], stored[name])}
    assert stored.keys() - same == {
        f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("mlp.down_proj", "self_attn.o_proj")
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in written(folder, tmp_path / "all", dtype="bfloat16").values()} == {torch.bfloat16}


def test_a_wider_dtype_keeps_what_the_merge_gives(saved: Saved, tmp_path: Path) -> None:
    base = make_donor(tmp_path / "half", dtype=torch.bfloat16)
    folder, model = saved(base)
    layer = next(layer for layer in layers(model) if layer.in_features == 128)
    own = load_file(base / "model.safetensors")[CHANGED]
    exact = merged_weight(own.float(), [layer.branches("default")])
    found = written(folder, tmp_path / "wide", dtype="float32")[CHANGED]
    assert torch.equal(found, exact)
    assert not torch.equal(found, exact.bfloat16().float())
    assert torch.equal(written(folder, tmp_path / "out")[CHANGED], exact.bfloat16())


def test_a_narrower_dtype_comes_after_the_sum(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    folder, _ = saved()
    wide, narrow = written(folder, tmp_path / "wide"), written(folder, tmp_path / "out", dtype="bfloat16")
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)


def test_float16_that_is_too_narrow_says_what_is_not(tmp_path: Path) -> None:
    base = make_donor(tmp_path / "half", dtype=torch.float16)
    model = adapted(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM", std=60.0, scale=50.0)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"infinite; .* or float16 is too narrow: --dtype bfloat16"):
        written(tmp_path / "adapter", tmp_path / "out")
    assert written(tmp_path / "adapter", tmp_path / "out", dtype="bfloat16")[CHANGED].isfinite().all()


def test_the_licence_is_the_base_s(saved: Saved, tmp_path: Path) -> None:
    base = make_donor(tmp_path / "licensed")
    folder, _ = saved(base)
    for place, text in ((base, "of the base"), (folder, "of the adapter")):
        (place / "LICENSE").write_text(text)
        (place / "NOTICE").write_text(text)
    written(folder, tmp_path / "out")
    assert [(tmp_path / "out" / name).read_text() for name in ("LICENSE", "NOTICE")] == ["of the base"] * 2


def test_nothing_is_written_into_what_is_read(saved: Saved, biased_donor: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(biased_donor, base)
    folder, _ = saved(base)
    for out, message in (
        (folder / "sub", "is inside .*adapter, which is only read; choose another folder with -o"),
        (base / "sub" / "sub", "is inside .*base, which is only read"),
        (folder, "is read by this command"),
        (base, "is read by this command"),
    ):
        for force in (True, False) if not out.exists() else (True,):
            with pytest.raises(OutputError, match=message):
                mhconvert.merge(str(folder), str(out), force=force)
            with pytest.raises(OutputError, match=message):
                mhconvert.export(str(folder), "lora", str(out), force=force)
    assert not (folder / "sub").exists()
    assert not (base / "sub").exists()
