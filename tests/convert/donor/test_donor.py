"""A donor hands out transformers' own layers with the stored weights; what cannot be one is refused by name."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mhconvert.convert.donor.donor import open_donor
from mhconvert.errors import CheckpointError, MhconvertError, UnsupportedError
from tests.donors import make_donor, make_gguf

IDS = torch.arange(40).view(2, 20) * 7 % 320


def message(error: "pytest.ExceptionInfo[MhconvertError]") -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.fixture(params=["tied", "untied-shards", "bf16", "mistral", "wide-heads", "gguf"])
def place(request, tmp_path):
    makers = {
        "tied": lambda: make_donor(tmp_path / "donor"),
        "untied-shards": lambda: make_donor(tmp_path / "donor", tied=False, shards=3),
        "bf16": lambda: make_donor(tmp_path / "donor", dtype=torch.bfloat16, tied=False),
        "mistral": lambda: make_donor(tmp_path / "donor", family="mistral", sliding_window=None, kv_heads=4),
        "wide-heads": lambda: make_donor(tmp_path / "donor", head_dim=32, kv_heads=1),
        "gguf": lambda: make_gguf(tmp_path / "donor.gguf", quantization="Q8_0"),
    }
    return makers[request.param]()


def reference_model(place: Path) -> Any:
    folder, extra = (place.parent, {"gguf_file": place.name}) if place.suffix == ".gguf" else (place, {})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra).eval()


@torch.no_grad()
def test_layer_by_layer_equals_transformers(place):
    donor, reference = open_donor(str(place)), reference_model(place)
    hidden = donor.embed(IDS)
    positions = donor.rotary("cpu")(hidden, torch.arange(IDS.shape[1])[None])
    for index in range(donor.config.num_hidden_layers):
        layer = donor.decoder_layer(index, "cpu")
        assert not layer.training
        assert not any(weight.requires_grad for weight in layer.parameters())
        hidden = layer(hidden, position_embeddings=positions, attention_mask=None)
    assert torch.equal(donor.head(hidden), reference(IDS).logits)
    assert torch.equal(donor.model("cpu")(IDS).logits, reference(IDS).logits)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be told what is read soon")
def test_the_next_layer_is_read_ahead_forwards_and_backwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = open_donor(str(make_donor(tmp_path / "donor", layers=4, shards=3)))
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, nbytes, advice: told.append((offset, nbytes)))
    advised = []
    for index in (0, 1, 2, 3, 3, 2, 1, 0):
        told.clear()
        donor.decoder_layer(index, "cpu")
        advised.append(list(told))
    of_layer = dict(zip((1, 2, 3), advised, strict=False))
    assert advised[3:] == [[], of_layer[3], of_layer[1], advised[6], []]
    assert sorted(advised[6]) != sorted(of_layer[1])
    assert sum(nbytes for _, nbytes in of_layer[1]) == sum(
        donor.source.nbytes(name) for name in donor.layer_tensor_names(1)
    )


def test_every_stored_tensor_belongs_to_a_layer_or_outside(place):
    donor = open_donor(str(place))
    layers = [donor.layer_tensor_names(i) for i in range(donor.config.num_hidden_layers)]
    together = [name for names in (*layers, donor.outer_tensor_names()) for name in names]
    assert sorted(together) == sorted(donor.source.names())


def test_facts_of_a_donor(tmp_path):
    donor = open_donor(str(make_donor(tmp_path / "Tiny-Llama", dtype=torch.bfloat16)))
    assert (donor.name, donor.hub_id, donor.notice, donor.licence) == ("tiny-llama", None, None, None)
    assert donor.dtype == donor.source.dtype("model.norm.weight") == torch.bfloat16
    assert donor.config._attn_implementation == "sdpa"
    assert donor.folder == tmp_path / "Tiny-Llama"
    edit_config(donor.folder, dtype=None)
    (donor.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    again = open_donor(str(donor.folder))
    assert again.dtype == torch.bfloat16
    assert again.licence == "apache-2.0"


def test_a_dropped_layer_is_freed_and_the_next_is_unharmed(tmp_path):
    donor = open_donor(str(make_donor(tmp_path)))
    layer = donor.decoder_layer(0, "cpu")
    weight = weakref.ref(layer.self_attn.q_proj.weight)
    layer.self_attn.q_proj.weight.zero_()
    del layer
    assert weight() is None
    assert donor.decoder_layer(0, "cpu").self_attn.q_proj.weight.any()


def test_layer_dtype(tmp_path):
    donor = open_donor(str(make_donor(tmp_path)))
    layer = donor.decoder_layer(1, "cpu", torch.bfloat16)
    assert {weight.dtype for weight in layer.parameters()} == {torch.bfloat16}
    assert donor.model("cpu", torch.float16).dtype == torch.float16


def test_rotary_has_real_fp32_buffers(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    donor = open_donor(str(make_donor(tmp_path, rope=rope)))
    ours, theirs = donor.rotary("cpu").inv_freq, reference_model(tmp_path).model.rotary_emb.inv_freq
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_generation_runs_on_the_whole_model(place):
    donor = open_donor(str(place))
    out = donor.model("cpu").generate(IDS[:1, :5], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 9)
    assert donor.generation_config().eos_token_id == 1


def test_files_are_copied_unchanged(tmp_path):
    folder = make_donor(tmp_path / "donor")
    (tmp_path / "out").mkdir()
    open_donor(str(folder)).copy_files(tmp_path / "out")
    copied = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"} < set(copied)
    assert "generation_config.json" in copied
    assert not {"config.json", "model.safetensors"} & set(copied)
    assert all((folder / name).read_bytes() == content for name, content in copied.items())


def test_unsupported_family_opens_for_inspection_but_gives_no_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    donor = open_donor(str(tmp_path))
    with pytest.raises(UnsupportedError, match="model type 'gpt2' is not supported"):
        _ = donor.source


def changed_weights(folder: Path, change) -> Path:
    weights = load_file(make_donor(folder) / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda w: w.pop(NORM), CheckpointError, f"tensor {NORM} is missing from"),
        (
            lambda w: w.update({NORM: torch.ones(63)}),
            CheckpointError,
            "has shape [63], but its config asks for [64]",
        ),
        (
            lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)}),
            UnsupportedError,
            "is stored as float8_e4m3fn; use the plain bf16 or fp16 donor",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(tmp_path, change, kind, words):
    donor = open_donor(str(changed_weights(tmp_path, change)))
    with pytest.raises(kind) as error:
        _ = donor.source
    assert words in message(error)


UNUSED: dict[str, Tensor] = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb.original_inv_freq": torch.ones(8),
    "model.layers.1.self_attn.k_scale": torch.ones(1),
    "model.layers.1.self_attn.v_proj.output_scale": torch.ones(1),
    "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
    "v_head.summary.weight": torch.ones(1, 64),
    "score.weight": torch.ones(2, 64, dtype=torch.float8_e4m3fn),
    "mtp.layers.0.self_attn.q_proj.weight": torch.ones(64, 64),
    "model.mtp_block.norm.weight": torch.ones(64),
    "model.layers.2.self_attn.q_proj.bias": torch.ones(64),  # behind the last of two layers
}


def test_tensors_that_no_output_depends_on_are_left_aside_and_named(tmp_path):
    expected = open_donor(str(make_donor(tmp_path / "plain"))).model("cpu")(IDS).logits
    donor = open_donor(str(changed_weights(tmp_path / "more", lambda w: w.update(UNUSED))))
    told = []
    donor.open_weights(told.append)
    assert torch.equal(donor.model("cpu")(IDS).logits, expected)
    names = donor.outer_tensor_names() + donor.layer_tensor_names(0) + donor.layer_tensor_names(1)
    assert not set(UNUSED) & set(names)
    assert set(donor.published_names().values()) == set(names)
    [event] = told
    assert event.message.startswith("left aside, as LlamaForCausalLM has no place for it: ")
    assert event.message.endswith(f" and {len(UNUSED) - 3} more")
    assert sum(name in event.message for name in UNUSED) == 3


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.mlp.up_proj.weight_scale",
        "model.embed_positions.weight",
        "lm_head.bias",
        "layers.0.mlp.up_proj.bias",
    ],
)
def test_surplus_tensors_that_would_change_what_is_computed(tmp_path, name):
    donor = open_donor(str(changed_weights(tmp_path, lambda w: w.update({name: torch.ones(64)}))))
    with pytest.raises(CheckpointError) as error:
        _ = donor.source
    assert f"tensor {name} in" in message(error)
    assert "would change what the model computes: correct config.json, or remove the tensor" in message(error)


def test_nan_surfaces_with_the_layer_that_holds_it(tmp_path):
    donor = open_donor(str(changed_weights(tmp_path, lambda w: w[NORM].fill_(float("nan")))))
    donor.decoder_layer(0, "cpu")
    with pytest.raises(CheckpointError, match=f"tensor {NORM} in .* holds NaN values"):
        donor.decoder_layer(1, "cpu")


def test_missing_tokenizer(tmp_path):
    folder = make_donor(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be loaded"):
        open_donor(str(folder)).tokenizer()


def test_tokenizer_code_is_carried_only_when_trusted(tmp_path):
    """What auto_map names, by any name, and what that imports; nothing else."""
    folder = make_donor(tmp_path / "donor")
    file = folder / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "code.words.Words"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
    (folder / "code").mkdir()
    (folder / "code" / "words.py").write_text("from .names import A\nfrom . import more\n")
    for name in ("code/names.py", "code/more.py", "tokenization_tiny.py", "modeling_tiny.py"):
        (folder / name).write_text("A = 1")
    for trust in (False, True):
        out = tmp_path / str(trust)
        out.mkdir()
        open_donor(str(folder), trust_remote_code=trust).copy_files(out)
        carried = {path.relative_to(out).as_posix() for path in out.rglob("*.py")}
        assert carried == ({"code/words.py", "code/names.py", "code/more.py"} if trust else set())
