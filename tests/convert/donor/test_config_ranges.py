"""Every number of a config is in its range before anything is built of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from mhconvert.convert.donor import config_file
from mhconvert.convert.donor.config_check import require_layers, require_ranges
from mhconvert.convert.donor.config_ranges import PER_LAYER, RANGES, Range
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.families.facts import FAMILIES
from mhconvert.convert.open_model import open_model
from mhconvert.errors import CheckpointError
from tests.conftest import Main
from tests.donors import make_donor

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FILE = Path("config.json")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"head_dim": 0}, "head_dim=0 is not a whole number from 1 to 65,536"),
    ({"hidden_size": 64.0}, "hidden_size=64.0 is not a whole number"),
    ({"num_attention_heads": True}, "num_attention_heads=true is not a whole number"),
    (
        {"num_attention_heads": 65, "head_dim": None},
        "num_attention_heads=65 is not a whole number from 1 to hidden",
    ),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000 is not a whole number from 1 to 67,108,864"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not a whole number from 1 to 4,096"),
    ({"num_hidden_layers": 3}, "says that there are 3 layers, and its weights have tensors of 2"),
    (
        {"layer_types": ["full_attention"]},
        'layer_types=["full_attention"] is not a list with an entry for each of 2',
    ),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps=Infinity is not a number above 0, at most 1"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 is not a number above 0"),
    ({"rope_parameters": ROPE | {"factor": -8.0}}, "rope_parameters.factor=-8.0 is not a number above 0"),
    (
        {"rope_parameters": ROPE | {"rope_theta": math.inf}},
        "rope_parameters.rope_theta=Infinity is not a number",
    ),
    (
        {"rope_parameters": ROPE | {"high_freq_factor": 1.0}},
        "high_freq_factor=1.0 is not above low_freq_factor=1.0",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": math.nan}}},
        "full_attention.rope_theta=NaN is not",
    ),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        'rope_scaling.factor="2" is not a number above 0',
    ),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1, 0]}},
        "rope_scaling.short_factor[1]=0 is not",
    ),
    ({"rope_parameters": [ROPE]}, "is not a mapping of settings"),
    ({"eos_token_id": "<|eos|>"}, 'eos_token_id="<|eos|>" is not a whole number from -1'),
    ({"eos_token_id": [1, 2.5]}, "eos_token_id[1]=2.5 is not a whole number from -1"),
    (
        {"num_local_experts": 4, "num_experts_per_tok": 5},
        "num_experts_per_tok=5 is not a whole number from 1 to 4",
    ),
    ({"torch_dtype": "int8"}, 'torch_dtype="int8" is not one of float32, bfloat16, float16, float64'),
    ({"dtype": 16}, "dtype=16 is not one of float32"),
    (
        {"architectures": "LlamaForCausalLM"},
        'architectures="LlamaForCausalLM" is not a list of names of classes',
    ),
    ({"architectures": [7]}, "architectures=[7] is not a list of names of classes"),
    ({"hidden_act": "square"}, 'hidden_act="square" is not one of gelu, '),
    (
        {"rope_parameters": ROPE | {"rope_type": "odd"}},
        'rope_parameters.rope_type="odd" is not one of default, ',
    ),
    ({"rope_parameters": ROPE | {"rope_type": {}}}, "rope_parameters.rope_type={} is not one of default, "),
    ({"rope_parameters": ROPE | {"factor": None}}, "rope_parameters.factor=null is not a number above 0"),
    ({"some_new_scale": math.nan}, "some_new_scale=NaN is not a finite number"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("ranges") / "donor")


@pytest.fixture
def stated(folder: Path) -> Any:
    """Writes config.json with changes, and afterwards as it was; a `dtype` goes before `torch_dtype`."""
    file = folder / "config.json"
    before = file.read_text()

    def write(changes: dict[str, Any]) -> None:
        values = json.loads(before)
        if "torch_dtype" in changes:
            del values["dtype"]
        file.write_text(json.dumps(values | changes))

    yield write
    file.write_text(before)


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_a_number_out_of_range(
    main: Main,
    folder: Path,
    stated: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: str,
) -> None:
    stated(changes)
    monkeypatch.setattr(config_file, "AutoConfig", None)  # nothing is built of it
    assert main(folder, "--to", "mla", "-o", tmp_path / "out") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert "config.json" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "pad_token_id": None},
        {"pad_token_id": -1, "sliding_window": 0, "architectures": [], "torch_dtype": "bfloat16"},
        {"architectures": None, "dtype": None, "eos_token_id": [1, 2], "max_position_embeddings": 10_485_760},
        {"rms_norm_eps": 1.5625e-07, "rope_theta": 10**10, "initializer_range": 0.0},
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "type": None,
                "factor": 4.0,
                "original_max_position_embeddings": 64.0,
            }
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": None}},
    ],
)
def test_what_published_configs_say_is_in_range(stated: Any, folder: Path, changes: dict[str, Any]) -> None:
    stated(changes)
    assert open_donor(str(folder)).config.num_hidden_layers == 2


def test_a_null_that_the_class_cannot_have_names_the_donor(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "donor", family="mixtral")
    values = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(values | {"num_experts": None}))
    with pytest.raises(
        CheckpointError, match=r"no mixtral model can be built of the config of .*donor: TypeError: "
    ):
        open_donor(str(donor)).shapes()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_every_family_are_in_range_and_its_numbers_are_known(family: str) -> None:
    values = CONFIG_MAPPING[family]().to_dict()
    require_ranges(values, FILE)
    numbers = {name for name, value in values.items() if isinstance(value, float)}
    assert numbers <= RANGES.keys()


def test_a_converted_checkpoint_is_asked_too(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {
        "model_type": "mla_llama",
        "kv_lora_rank": [8, 8],
    }
    for changes, words in (
        ({"softmax_scale": math.inf}, "softmax_scale=Infinity is not a number above 0"),
        ({"kv_lora_rank": [8, -8]}, r"kv_lora_rank\[1\]=-8 is not a whole number from 0"),
        ({"qk_nope_head_dim": [16, 0.5]}, r"qk_nope_head_dim\[1\]=0.5 is not a whole number from 0"),
        ({"qk_nope_head_dim": [16]}, r"qk_nope_head_dim=\[16\] is not a list with an entry for each of 2"),
        (
            {"rope_frequencies": [[0]]},
            r"rope_frequencies=\[\[0\]\] is not a list with an entry for each of 2",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | changes))
        with pytest.raises(CheckpointError, match=rf"config\.json: {words}"):
            open_model(str(tmp_path))


def outside(allowed: Range) -> st.SearchStrategy[Any]:
    """Anything but a number that `allowed` holds."""
    wrong: list[st.SearchStrategy[Any]] = [
        st.sampled_from([math.nan, math.inf, -math.inf, True, "1", {}, -(10**400)])
    ]
    wrong += [st.integers(min_value=int(allowed.high) + 1), st.integers(max_value=int(allowed.low) - 1)]
    if allowed.whole:
        wrong.append(st.floats().filter(lambda value: not value.is_integer()))  # RoPE takes 4096.0
    else:
        wrong.append(st.floats(max_value=allowed.low, exclude_max=not allowed.above))
        wrong.append(st.floats(min_value=allowed.high, exclude_min=True))
    return st.one_of(wrong)


def inside(allowed: Range) -> st.SearchStrategy[Any]:
    if allowed.whole:
        return st.integers(int(allowed.low), int(allowed.high))
    return st.floats(allowed.low, allowed.high, exclude_min=allowed.above)


@settings(deadline=None)
@given(st.data())
def test_every_value_out_of_range_is_refused_by_its_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RANGES)))
    value = data.draw(outside(RANGES[name]))
    entry = [value] if RANGES[name].lists and data.draw(st.booleans()) else value
    place = data.draw(st.sampled_from(["", "rope_parameters", "rope_scaling", "text_config"]))
    values = {place: {name: entry}} if place else {name: entry}
    with pytest.raises(CheckpointError, match=rf"config\.json: .*\b{name}(\[0\])?="):
        require_ranges(values, FILE)


@settings(deadline=None)
@given(st.data())
def test_no_value_in_range_is_refused(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(RANGES)), unique=True))
    values = {name: data.draw(st.none() | inside(RANGES[name])) for name in names}
    apart = (
        "high_freq_factor",
        "num_experts_per_tok",
        "num_attention_heads",
    )  # in a range that another field sets
    require_ranges({name: value for name, value in values.items() if name not in apart}, FILE)


@settings(deadline=None)
@given(st.integers(1, 4096), st.sampled_from(PER_LAYER), st.integers(0, 50))
def test_a_list_has_an_entry_for_each_layer(layers: int, name: str, length: int) -> None:
    values = {"num_hidden_layers": layers, name: [1] * length}
    if layers == length:
        require_ranges(values, FILE)
        return
    with pytest.raises(CheckpointError, match=f"{name}=.* an entry for each of {layers} layers"):
        require_ranges(values, FILE)


@settings(deadline=None)
@given(st.integers(1, 10**12), st.integers(1, 40))
def test_layers_are_counted_by_the_tensors(count: int, stored: int) -> None:
    names = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(stored)]
    if count <= stored:
        require_layers(count, names, FILE)
        return
    with pytest.raises(
        CheckpointError, match=f"there are {count} layers, and its weights have tensors of {stored};"
    ):
        require_layers(count, names, FILE)
