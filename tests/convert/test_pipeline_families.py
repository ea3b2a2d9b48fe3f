"""The pass at full rank gives a donor back whatever its family does around its attention: embedding, head, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhconvert.convert import pipeline
from mhconvert.convert.methods.mla import register
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.layer_fit import fit
from tests.convert.conversions import logits, relative, token_ids
from tests.convert.methods.mla.test_families_exact import VARIANTS, full_rank
from tests.donors import make_donor

FLOAT32 = 2e-5  # as in test_families_exact


@pytest.mark.parametrize(
    "variant", ["gemma2", "gemma3_text", "granite", "olmo2", "phi3-partial", "qwen2_moe", "stablelm"]
)
def test_a_run_at_full_rank_writes_the_donor(variant: str, tmp_path: Path, text: Path) -> None:
    options: dict[str, Any] = VARIANTS[variant]
    folder = make_donor(tmp_path / "donor", family=variant.split("-")[0], **options)
    donor = AutoModelForCausalLM.from_pretrained(folder)
    recipe = Recipe(
        str(folder),
        "mla",
        settings=full_rank(donor.config),
        output=str(tmp_path / "out"),
        effort="quick",
        calibration=Calibration((str(text),), tokens=512, sequence_length=64, held_out=2),
        verify=False,
        device="cpu",
    )
    report = pipeline.convert_checkpoint(recipe, fit=fit, measure=Fidelity, finish=lambda *_: None)
    register()
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), token_ids(2, 40)
    assert type(model).__name__ == f"MLA{type(donor).__name__}"
    expected = logits(donor, ids)
    assert expected.std() > 0.1
    assert relative(logits(model, ids), expected) < FLOAT32
    assert all(layer["relative_error"] < 1e-8 for layer in report["layers"])
    assert report["kl"] < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gemma3_text", "granite"])
def test_the_head_and_the_embedding_are_the_familys(variant: str, tmp_path: Path) -> None:
    from mhconvert.convert.donor.donor import open_donor

    folder = make_donor(tmp_path / "donor", family=variant, **VARIANTS[variant])
    donor, reference, ids = (
        open_donor(str(folder)),
        AutoModelForCausalLM.from_pretrained(folder),
        token_ids(2, 9),
    )
    output = reference(input_ids=ids, output_hidden_states=True)
    assert relative(donor.embed(ids), output.hidden_states[0]) < FLOAT32
    assert relative(logits(donor.model("cpu"), ids), output.logits) < FLOAT32
