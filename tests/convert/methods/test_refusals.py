"""What a method can convert follows from the config alone, and every refusal says which feature stands in the way."""

import pytest
from transformers import AutoConfig

from mhconvert.convert.families.facts import FAMILIES
from mhconvert.convert.methods.refusals import refusals, require
from mhconvert.errors import UnsupportedError
from tests.donors import make_config

PLAIN = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize("family", sorted(name for name, row in FAMILIES.items() if row.refused is None))
def test_supported_families_apply(family):
    window = {} if family == "cwm" else {"sliding_window": None}  # a config of cwm has one
    config = make_config(family=family, pad_token_id=1, **window)
    assert refusals(config)["mla"] is None
    assert require(config, "mla") is FAMILIES[family]


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
        (make_config(heads=4, kv_heads=3), "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        (make_config(use_qk_norm=True), "use_qk_norm=True: this norm of queries and keys"),
        (
            make_config(family="stablelm", qk_layernorm=True),
            "qk_layernorm=True: this norm of queries and keys",
        ),
        (make_config(family="olmo", clip_qkv=8.0), "clip_qkv=8.0 is not supported"),
        (
            make_config(family="gemma3_text", use_bidirectional_attention=True),
            "use_bidirectional_attention=True",
        ),
        (make_config(sliding_window=128), "sliding_window=128: llama models have no windowed attention"),
        (
            make_config(layer_types=["full_attention", "sliding_attention"]),
            "sliding_window=None: llama models have no windowed attention",
        ),
        (
            make_config(family="stablelm", rope={"partial_rotary_factor": 0.2}),
            "RoPE turns 3 of a head's 16 elements; both must be even",
        ),
        (
            make_config(
                family="phi3",
                head_dim=16,
                pad_token_id=1,
                rope={"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
                original_max_position_embeddings=512,
            ),
            "rope_type 'longrope' is not supported",
        ),
        (
            make_config(layer_types=["full_attention", "chunked_attention"]),
            "layer_types has 'chunked_attention'",
        ),
        (make_config(rope={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic' is not supported"),
        (
            make_config(rope={"partial_rotary_factor": 0.5}),
            "partial_rotary_factor=0.5: llama models turn whole heads",
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
            "model type 'gpt2' is not supported; the supported ones are arcee, cwm, gemma, ",
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


def test_an_adapter_needs_a_known_unquantised_decoder_and_nothing_of_its_attention():
    assert require(make_config(sliding_window=64), "hydra").model_type == "llama"
    with pytest.raises(
        UnsupportedError, match=r"hydra cannot convert this donor: its weights are quantised \(AWQ\)"
    ):
        require(make_config(quantization_config={"quant_method": "awq", "bits": 4}), "hydra")


def test_unknown_method_is_refused():
    with pytest.raises(UnsupportedError, match="method 'mlb' is unknown"):
        require(make_config(), "mlb")
