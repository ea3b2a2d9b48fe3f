"""The rows of families say what transformers' own classes are."""

import pytest
from transformers import AutoModelForCausalLM

from mhconvert.convert.families.facts import FAMILIES
from tests.donors import make_config


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_norm_before_the_attention_is_that_of_the_class(family: str) -> None:
    config = make_config(family=family, sliding_window=8, pad_token_id=1)
    stock = AutoModelForCausalLM.from_config(config).model.layers[0]
    norm = FAMILIES[family].attention_norm
    assert (norm is None) == (not hasattr(stock, "input_layernorm"))
    assert (norm or "input_layernorm") == "input_layernorm"
