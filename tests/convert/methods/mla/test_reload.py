"""A written checkpoint in a process that has transformers and not mhconvert."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mhconvert.convert.bare_process.reload import verify, write_probe
from mhconvert.convert.checkpoint.provenance import write_config
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.methods.mla.method import MLA
from mhconvert.convert.methods.mla.settings import MLASettings
from tests.convert.conversions import YARN, assembled, converted_layers, logits, token_ids
from tests.donors import make_donor, stored_weights


def written(folder: Path, settings: MLASettings, **config: Any) -> Any:
    """Convert a random donor into `folder`; returns the converted model as it is in memory."""
    donor = open_donor(str(make_donor(folder.parent / f"{folder.name}-donor", **config)))
    method, stock = MLA(donor.config, settings, "quick"), donor.model("cpu")
    model = assembled(stock, method, converted_layers(stock, method, token_ids(4, 32)))
    folder.mkdir()
    save_file(stored_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    write_config(folder, method, donor, torch.float32)
    return model


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (MLASettings(kv_budget=0.5, kv_bits="16"), {"rope": YARN, "head_dim": 64}),
        (MLASettings(kv_budget=0.5, kv_bits="16"), {"family": "qwen3", "head_dim": 32}),
        (
            MLASettings(kv_budget=0.4, profile="portable"),
            {"family": "mistral", "sliding_window": None, "tied": False, "head_dim": 64},
        ),
    ],
    ids=["quality", "qk-norm", "portable"],
)
def test_the_reloaded_logits_are_the_same_bits(
    tmp_path: Path, settings: MLASettings, config: dict[str, Any]
) -> None:
    folder, ids = tmp_path / "converted", token_ids(2, 30)
    model = written(folder, settings, **config)
    rows = torch.cat(
        [logits(model, row.unsqueeze(0)) for row in ids]
    )  # one by one, as the other process does
    write_probe(tmp_path / "probe.safetensors", ids, rows)
    result = verify(
        folder,
        tmp_path / "probe.safetensors",
        prompt="The cache",
        max_new_tokens=6,
        threads=torch.get_num_threads(),
    )
    assert result["largest_logit_difference"] == 0
    assert result["module"] == "transformers_modules"
    assert result["model_class"] == type(model).__name__
    narrower = model.config.nope_width(0) < model.config.v_head_dim
    assert narrower == (settings.profile == "quality")
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    sizes = [model.config.latent_rank(n) + 2 * len(model.config.layer_frequencies(n)) for n in range(2)]
    assert result["cache"]["elements_per_token"] == sum(sizes) + 2 * model.config.num_key_scales


def test_the_decoder_alone_loads_too(tmp_path: Path) -> None:
    folder, ids = tmp_path / "converted", token_ids(2, 12)
    model = written(folder, MLASettings(kv_budget=0.5, kv_bits="16"))
    program = (
        "import sys, torch; sys.modules['mhconvert'] = None\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        f"torch.save(model(torch.tensor({ids.tolist()})).last_hidden_state, {str(tmp_path / 'hidden.pt')!r})\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "hidden.pt"), model.model(ids).last_hidden_state)
