"""DHA checkpoints of given head maps, and what plain transformers says of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhconvert
from mhconvert.convert.bare_process.child import cache_storage
from mhconvert.convert.bare_process.reload import PROMPT, verify, write_probe
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from tests.convert.conversions import logits, relative, token_ids
from tests.donors import make_donor

Maps = list[tuple[list[int], list[int]]]
NEW_TOKENS = 8  # behind a prompt of 22: fewer than the windows of these tests, which bound a cache


def make_dha(folder: Path, maps: Maps, *, dtype: torch.dtype = torch.float32, **donor: Any) -> Path:
    """Convert a donor into `folder`/dha; `maps`: of each layer the K head and V head that each query head reads."""
    options = {"heads": len(maps[0][0]), "kv_heads": len(maps[0][0])} | donor
    place = make_donor(folder / "donor", layers=len(maps), dtype=dtype, **options)
    plan = [{"k_map": k_map, "v_map": v_map} for k_map, v_map in maps]
    recipe = Recipe(
        str(place),
        "dha",
        settings=DHASettings(plan=plan),
        output=str(folder / "dha"),
        calibration=Calibration(tokens=512, sequence_length=64, held_out=2),
        fit_steps=0,
        verify=False,
        device="cpu",
    )
    mhconvert.convert(recipe)
    return folder / "dha"


def load(folder: Path) -> Any:
    """The model in `folder` as transformers loads it, float32; every tensor has its place."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loading.values())
    return model.eval()


@torch.inference_mode()
def continuation(model: Any, folder: Path) -> tuple[list[int], float]:
    """Token ids that the model writes behind a prompt, greedily, and the bytes of cache of each token."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    found = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = found.past_key_values
    return found.sequences[0].tolist(), cache_storage(cache)[0] / cache.get_seq_length()


def require_same(checkpoint: Path, export: Path, report: dict[str, Any], bound: float = 2e-6) -> None:
    """Logits to fp32 noise of two layers, the greedy continuation, and both caches as they were computed.

    The cache is float32 here, whatever the dtype of the weights.
    """
    models = {checkpoint: load(checkpoint), export: load(export)}
    ids = token_ids(3, 40)
    before, after = (logits(model, ids) for model in models.values())
    assert relative(after, before) <= bound
    (text, small), (same, stock) = (continuation(model, folder) for folder, model in models.items())
    assert text == same
    widening = 4 / getattr(torch, report["dtype"]).itemsize
    assert {"checkpoint": small, "export": stock} == {
        name: size * widening for name, size in report["kv_bytes_per_token"].items()
    }


def elsewhere(checkpoint: Path, export: Path, work: Path) -> dict[str, Any]:
    """What `verify` says of the export in a process that has no mhconvert, of the logits of `checkpoint`."""
    ids, probe = token_ids(3, 40), work / "probe.safetensors"
    write_probe(probe, ids, logits(load(checkpoint), ids))
    return verify(export, probe, prompt=PROMPT, max_new_tokens=NEW_TOKENS)
