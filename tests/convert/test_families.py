"""What a method can convert follows from the config alone, and every refusal says which feature stands in the way."""

import pytest
from transformers import AutoConfig

from mhconvert.convert.errors import UnsupportedError
from mhconvert.convert.families import FAMILIES, family_of, refusals, require
from tests.donors import make_config

PLAIN = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_supported_families_apply(family):
    config = make_config(family=family, sliding_window=None)
    assert refusals(config)["mla"] is None
    assert require(config, "mla") is FAMILIES[family]
    assert family_of(config).attention_norm == "input_layernorm"


@pytest.mark.parametrize(
    ("rope"),
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ],
)
def test_scalings_by_a_constant_apply(rope):
    assert refusals(make_config(rope=rope))["mla"] is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (make_config(attention_bias=True), "attention_bias=True: projections with biases"),
        (make_config(heads=4, kv_heads=3), "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        (make_config(mlp_bias=True), "mlp_bias=True: projections with biases"),
        (make_config(use_qk_norm=True), "use_qk_norm=True: QK-norm is not supported yet"),
        (make_config(family="mistral", sliding_window=128), "sliding_window=128: windowed attention"),
        (
            make_config(layer_types=["full_attention", "chunked_attention"]),
            "layer_types has 'chunked_attention'",
        ),
        (make_config(rope={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic' is not supported"),
        (
            make_config(rope={"partial_rotary_factor": 0.5}),
            "partial_rotary_factor=0.5: only RoPE over the whole head",
        ),
        (
            make_config(architectures=["LlamaForSequenceClassification"]),
            "LlamaForSequenceClassification is not a causal",
        ),
        (
            make_config(quantization_config={"quant_method": "awq"}),
            "its weights are quantised (AWQ); use the plain",
        ),
        (make_config(quantization_config={"quant_method": "gptq"}), "quantised (GPTQ)"),
        (make_config(quantization_config={"quant_method": "fp8"}), "quantised (FP8)"),
        (make_config(quantization_config={"load_in_4bit": True}), "quantised (bitsandbytes)"),
        (make_config(quantization_config={"quant_method": "hqq"}), "quantised (hqq)"),
        (
            AutoConfig.for_model("gpt2"),
            "model type 'gpt2' is not supported; the supported ones are llama, mistral",
        ),
        (AutoConfig.for_model("bert", architectures=["BertForMaskedLM"]), "BertForMaskedLM is not a causal"),
        (AutoConfig.for_model("t5"), "it is an encoder-decoder model (t5)"),
        (AutoConfig.for_model("llava"), "it is multimodal (vision_config); only text decoders"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_feature(config, words):
    assert words in (refusals(config)["mla"] or "")
    with pytest.raises(UnsupportedError, match="mla cannot convert this donor: ") as error:
        require(config, "mla")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["moh", "dha", "hydra"])
def test_methods_to_come_say_so(method):
    with pytest.raises(UnsupportedError, match="not available in this version"):
        require(make_config(), method)


def test_unknown_method_is_refused():
    with pytest.raises(UnsupportedError, match="method 'mlb' is unknown"):
        require(make_config(), "mlb")
