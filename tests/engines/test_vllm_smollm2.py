"""SmolLM2's trained weights in vLLM: trained weights have outliers, which random ones lack."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import Cli
from tests.engines.engines_table import EnginesTable
from tests.engines.exported_forms import NEW_TOKENS, in_transformers
from tests.engines.server import free_port, post, running
from tests.engines.smollm2 import DONOR, LAYERS, SENTENCES, SmolLM2
from tests.engines.vllm_run import BFLOAT16, FLOAT32, PYTHON, compare, needs_vllm

pytestmark = needs_vllm

FORMS = {  # name: attribute of SmolLM2, elements of a token's cache
    "SmolLM2-135M, donor": ("donor", DONOR),
    "SmolLM2-135M, deepseek_v3, row 128 + 64 with --pad-row 576": ("latent", 576 * LAYERS),
    "SmolLM2-135M, dha --uniform": ("uniform", DONOR // 3),
}


@pytest.fixture(scope="module")
def smollm2(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> SmolLM2:
    return SmolLM2(cli, tmp_path_factory.mktemp("smollm2"))


@pytest.mark.parametrize("form", FORMS)
def test_vllm_computes_what_transformers_computes(form: str, smollm2: SmolLM2, engines: EnginesTable) -> None:
    attribute, elements = FORMS[form]
    folder: Path = getattr(smollm2, attribute)
    found = compare(folder, smollm2.prompts)
    assert found.difference < 1e-4
    assert found.greedy_equal
    assert found.about["cache_bytes_per_token"] == elements * FLOAT32
    facts = {"cache": elements * FLOAT32, "share": elements / DONOR}
    engines.add(form, found.about, difference=found.difference, **facts)


def test_bfloat16_costs_no_more_than_the_donors(smollm2: SmolLM2, engines: EnginesTable) -> None:
    """Beside transformers in float32; what the donor loses in bfloat16 is the yardstick of the latent.

    dha's figure is recorded without a bound: it was 2.7 times the donor's (0.98 of 0.37), and why is not known yet."""
    lost = {}
    for form, (attribute, elements) in FORMS.items():
        found = compare(getattr(smollm2, attribute), smollm2.prompts, "bfloat16")
        assert found.about["cache_bytes_per_token"] == elements * FLOAT32 / 2
        lost[attribute] = found.difference
        facts = {"cache": elements * FLOAT32 // 2, "share": elements / DONOR}
        engines.add(f"{form}, bfloat16", found.about, difference=found.difference, **facts)
    assert lost["latent"] <= BFLOAT16 * lost["donor"]


def test_a_completion_is_the_text_of_transformers(smollm2: SmolLM2, tmp_path: Path) -> None:
    folder, port = smollm2.uniform, free_port()
    _, texts = in_transformers(folder, smollm2.prompts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = ["serve", folder, "--engine", "vllm", "--python", PYTHON, "--port", port, "--dtype", "float32"]
    with running(words, tmp_path / "said.txt", port):
        for sentence, tokens in zip(SENTENCES, texts, strict=True):
            asked = {"model": str(folder), "prompt": sentence, "max_tokens": NEW_TOKENS, "temperature": 0}
            (made,) = post(port, "/v1/completions", asked | {"ignore_eos": True})["choices"]
            assert made["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
