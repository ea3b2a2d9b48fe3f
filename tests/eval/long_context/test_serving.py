"""Which models read longer texts, how they are set to it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mhconvert import api
from mhconvert.convert.families.facts import class_free_values
from mhconvert.convert.methods.dha import configuration_dha
from mhconvert.convert.methods.mla import configuration_hybrid
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.methods.registry import register
from mhconvert.convert.methods.swa import configuration_swa
from mhconvert.convert.open_model import OpenModel, open_model
from mhconvert.errors import MhconvertError, RecipeError
from mhconvert.eval import retrieval
from mhconvert.eval.generation import Options
from mhconvert.eval.long_context.plan import plan
from mhconvert.eval.long_context.serving import serve
from mhconvert.eval.settings import EvalSettings
from tests.conftest import Main
from tests.donors import TEXT, make_checkpoint, make_config, make_donor, make_model, make_tokenizer

TRAINED = 48
IDS = torch.randint(2, 320, (2, 120), generator=torch.Generator().manual_seed(3))
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32, 2 layers, sums in another order
PLAIN: dict[str, Any] = {"sliding_window": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": PLAIN,
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "granite": {"attention_multiplier": 0.3},
    "olmo2": {},
    "phi3": PLAIN | {"rope": {"partial_rotary_factor": 0.5}, "pad_token_id": 1},
}


def opened_as(config: Any, adapter: Any = None) -> OpenModel:
    return OpenModel("tiny", config, "cpu", None, adapter=adapter)


def asked(kind: Any, **settings: Any) -> EvalSettings:
    return EvalSettings(retrieval=True, long_context=kind, **settings)


def tiny(family: str = "llama", **settings: Any) -> Any:
    return make_config(**({"family": family, "hidden": 32, "max_position_embeddings": TRAINED} | settings))


def extended(model: Any, kind: Any, longest: int = 120) -> Any:
    sizes = {"chunk_size": 8} if kind == "longheads" else {}
    return serve(model, plan(opened_as(model.config), asked(kind, **sizes), longest))


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids, **inputs).logits
    return found


def in_steps(model: Any) -> Tensor:
    cache = DynamicCache()
    parts = [IDS[:, :40], IDS[:, 40:75], *IDS[:, 75:82].split(1, dim=1), IDS[:, 82:]]
    return torch.cat([logits(model, part, past_key_values=cache) for part in parts], dim=1)


@pytest.mark.parametrize(
    ("kind", "family"),
    [*(("longheads", family) for family in FAMILIES), ("window", "llama"), ("window", "phi3")],
)
def test_families_read_longer_texts_by_one_function(kind: str, family: str) -> None:
    donor = make_model(tiny(family, **FAMILIES[family]))
    implementation = donor.config._attn_implementation
    short, long = logits(donor, IDS[:, :TRAINED]), logits(donor, IDS)
    model = extended(make_model(donor.config), kind)
    assert donor.config._attn_implementation == implementation  # the served model has a config of its own
    torch.testing.assert_close(logits(model, IDS[:, :TRAINED]), short, **CLOSE)
    read = logits(model, IDS)
    assert (read - long).abs().max() > 0.01
    torch.testing.assert_close(in_steps(model), read, **CLOSE)


def require_reading(plain: Any, model: Any, how: OpenModel) -> None:
    """That `model`, made as `plain`, reads as it up to the trained length, and beyond in steps as at once."""
    serve(model, plan(how, asked("longheads", chunk_size=8), 120))
    torch.testing.assert_close(logits(model, IDS[:, :TRAINED]), logits(plain, IDS[:, :TRAINED]), **CLOSE)
    read = logits(model, IDS)
    assert (read - logits(plain, IDS)).abs().max() > 0.01
    torch.testing.assert_close(in_steps(model), read, **CLOSE)


def test_decoupled_heads_read_longer_texts() -> None:
    """A step of theirs must not go past the attention function, to products with fewer heads."""
    register("dha")
    maps = {"k_head_map": [[0, 0, 1, 1], [0, 1, 1, 0]], "v_head_map": [[0, 0, 0, 0], [0, 1, 2, 3]]}
    config = configuration_dha.DHALlamaConfig(**class_free_values(tiny()), **maps)
    require_reading(make_model(config), make_model(config), opened_as(config))


def test_routed_heads_read_longer_texts(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "moh", "moh", MoHSettings(active=0.5))
    opened = open_model(str(folder), device="cpu")
    plain, model = opened.model(), opened.model()
    opened.config.max_position_embeddings = TRAINED
    require_reading(plain, model, opened)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("yarn", {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": TRAINED}),
        ("dynamic", {"rope_type": "dynamic", "factor": 1.0}),
    ],
)
def test_rope_types_are_those_of_transformers(kind: str, rope: dict[str, Any]) -> None:
    torch.testing.assert_close(
        logits(extended(make_model(tiny()), kind), IDS), logits(make_model(tiny(rope=rope)), IDS), **CLOSE
    )


def test_a_short_text_is_read_as_the_donor_reads_it() -> None:
    donor = logits(make_model(tiny()), IDS[:, :TRAINED])
    for kind in ("yarn", "dynamic"):
        torch.testing.assert_close(
            logits(extended(make_model(tiny()), kind, 30), IDS[:, :TRAINED]), donor, **CLOSE
        )


def test_a_dynamic_rope_is_that_of_the_text_whatever_was_read_before() -> None:
    model = extended(make_model(tiny()), "dynamic")
    for length in (120, 80, 30, 120, TRAINED):
        alone = logits(extended(make_model(tiny()), "dynamic"), IDS[:, :length])
        assert torch.equal(logits(model, IDS[:, :length]), alone)


def test_sizes_of_chunks_follow_the_trained_length() -> None:
    for trained, size, number in ((8192, 256, 32), (4096, 256, 16), (512, 32, 16), (40, 2, 20)):
        found = plan(opened_as(tiny(max_position_embeddings=trained)), asked("longheads"), 2 * trained)
        assert found is not None
        assert (found.chunk_size, found.chunks, found.factor) == (size, number, 2)


WINDOWED = {
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
}
REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("window", tiny("qwen2", **WINDOWED), {}, "layer 1 of tiny sees a window of 16"),
    ("longheads", tiny("mistral", sliding_window=24), {}, "layer 0 of tiny sees a window of 24"),
    ("longheads", tiny("gemma2", layer_types=["full_attention"] * 2), {}, "no softcap"),
    ("longheads", tiny("cohere"), {}, "model type 'cohere': its RoPE turns neighbouring elements"),
    ("yarn", tiny("cohere"), {}, "model type 'cohere': its RoPE turns neighbouring elements"),
    ("longheads", tiny(rope={"rope_type": "dynamic", "factor": 2.0}), {}, "has RoPE of type 'dynamic'"),
    (
        "yarn",
        tiny(rope={"rope_type": "linear", "factor": 2.0}),
        {},
        "RoPE of type default, and tiny has .*'linear'",
    ),
    ("longheads", tiny(), {"chunk_size": 17}, "2 chunks of 17 tokens: tiny was trained on 48 tokens"),
    ("longheads", tiny(), {"chunk_size": 8, "chunks": 7}, "7 chunks of 8 .* from 3 to 6"),
    ("window", tiny(), {"chunks": 4}, "are of --long-context longheads"),
    (None, tiny(), {"chunk_size": 4}, "are of --long-context longheads"),  # type: ignore[list-item]
    ("window", tiny(), {"kv_cache_dtype": "int4"}, "not those of --kv-cache-dtype int4"),
]


@pytest.mark.parametrize(("kind", "config", "settings", "fault"), REFUSED)
def test_what_cannot_be_read_so_is_refused(
    kind: Any, config: Any, settings: dict[str, Any], fault: str
) -> None:
    options = Options(**({"long_context": kind} | settings))
    with pytest.raises(MhconvertError, match=fault):
        plan(opened_as(config), options, 100)


def test_a_trained_length_that_only_the_class_knows_is_refused(tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "donor", hidden=32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(MhconvertError, match="does not say how long the texts of its training were"):
        plan(open_model(str(folder), device="cpu"), asked("window"), 100)


def test_latents_and_adapters_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "mla", settings=MLASettings(kv_budget=0.4, kv_bits="16"))
    with pytest.raises(
        MhconvertError, match=r"model type 'mla_llama': its cache or its RoPE is not that of a Llama"
    ):
        plan(open_model(str(folder), device="cpu"), asked("longheads"), 1000)
    with pytest.raises(MhconvertError, match="is an adapter; mhconvert merge makes one"):
        plan(opened_as(tiny(), adapter=object()), asked("yarn"), 100)


@pytest.mark.parametrize(
    ("config_class", "reason"),
    [
        (configuration_swa.SWALlamaConfig, "'swa_llama': its windowed layers keep the first tokens"),
        (configuration_hybrid.HybridLlamaConfig, "'hybrid_llama': its linear layers keep a state"),
    ],
)
@pytest.mark.parametrize("kind", ["window", "dynamic"])
def test_windows_and_linear_layers_are_refused_for_what_they_are(
    kind: str, config_class: Any, reason: str
) -> None:
    with pytest.raises(MhconvertError, match=reason):
        plan(opened_as(config_class(**class_free_values(tiny()))), asked(kind), 100)


@pytest.mark.parametrize(
    "more", [{"suite": "quick"}, {"generation": True}, {"refusals": True}, {"retrieval": False}]
)
def test_only_texts_and_needles_are_longer(more: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="long_context is of text and retrieval"):
        EvalSettings(
            **({"retrieval": True, "tasks": "piqa" if not more.get("retrieval", True) else ()} | more),
            long_context="yarn",
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    make_donor(folder / "tiny", hidden=32, max_position_embeddings=TRAINED)
    (folder / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    return folder


def test_generate_writes_beyond_the_trained_length(place: Path) -> None:
    with pytest.raises(MhconvertError, match="reads at most 48 tokens and"):
        api.generate(str(place / "tiny"), TEXT, device="cpu")
    texts = {
        kind: api.generate(str(place / "tiny"), TEXT, max_new_tokens=4, long_context=kind, device="cpu")
        for kind in ("longheads", "window", "yarn", "dynamic")
    }
    for kind, result in texts.items():
        assert (result["long_context"], result["new_tokens"]) == (kind, 4)
        assert (
            result["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
        )  # layers, K and V, KV heads, head_dim, float32


def test_eval_measures_a_donor_beside_itself(
    main: Main, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    words = ["eval", place / "tiny", "--text", place / "text.txt", "--sequence-length", 96, "--sequences", 1]
    words += ["--retrieval", "--retrieval-lengths", "100,120", "--retrieval-trials", 1]
    assert (
        main(*words, "--long-context", "longheads", "--chunks", 4, "--json", "--quiet", "--device", "cpu")
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert [model["name"] for model in result["models"]] == ["tiny", "tiny longheads"]
    assert [model["long_context"] for model in result["models"]] == [None, "longheads"]
    [text], found = result["texts"], result["retrieval"]
    plain, read = (model["perplexity"] for model in text["models"])
    assert plain != pytest.approx(read, rel=1e-4)
    assert (found["lengths"], found["trials"], found["left_out"]) == ([100, 120], 1, [])
    model = serve(make_model(tiny()), plan(opened_as(tiny()), asked("longheads", chunks=4), 120))
    options: dict[str, Any] = {"lengths": (100, 120), "trials": 1, "beyond": True}
    expected = retrieval.probe(model, make_tokenizer(), **options)
    for row, of_length in zip(found["models"][1]["nll"], expected["nll"], strict=True):
        assert row == pytest.approx(of_length, rel=1e-5)
    assert found["models"][0]["mean_nll"] != pytest.approx(expected["mean_nll"], rel=1e-3)
