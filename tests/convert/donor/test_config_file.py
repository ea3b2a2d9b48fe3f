"""What trainers leave in a config decides nothing of a conversion; what cannot work is refused at the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhconvert
from mhconvert.convert.checkpoint import provenance
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.export.same_outputs import continuation
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.open_model import open_model
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.convert.storage import safetensors_reader
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.donors import make_donor

SWITCHES = {
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "torchscript": True,
    "num_beams": 4,
    "_attn_implementation": "eager",
    "attn_implementation": "flash_attention_2",
}
GENERATION = {
    "use_cache": False,
    "do_sample": True,
    "num_return_sequences": 2,
    "num_beams": 2,
    "temperature": 0.1,
    "max_length": 8,
    "stop_strings": ["a"],
    "cache_implementation": "static",
    "return_dict_in_generate": False,
    "bos_token_id": 0,
    "eos_token_id": [1, 319],
    "pad_token_id": 1,
}


def edit(file: Path, **changes: Any) -> None:
    """The JSON object in `file`, with changes."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_runtime_switches_are_not_carried(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plain, folder = make_donor(tmp_path / "plain"), make_donor(tmp_path / "donor")
    edit(folder / "config.json", **SWITCHES)
    for place in (plain, folder):
        mhconvert.convert(recipe(tmp_path / f"{place.name}-mla", model=str(place), fit_steps=0))
    written, expected = (
        json.loads((tmp_path / f"{name}-mla" / "config.json").read_text()) for name in ("donor", "plain")
    )
    assert {**written, "torchscript": None} == {**expected, "torchscript": None}
    assert not written.get("torchscript")
    assert open_donor(str(folder)).model("cpu").generate(torch.tensor([[2]]), max_new_tokens=2).shape == (
        1,
        3,
    )


def test_generation_settings_are_carried_and_decide_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    folder = make_donor(tmp_path / "donor")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    report = mhconvert.convert(recipe(tmp_path / "out", model=str(folder), fit_steps=0, verify=True))
    assert (tmp_path / "out" / "generation_config.json").read_text() == json.dumps(GENERATION)
    opened = open_model(str(tmp_path / "out"))
    assert report["sample"]["converted"] == continuation(opened.model(), opened.tokenizer())
    assert report["verified"]["cache"]["type"] == "DynamicCache"
    for place in (folder, tmp_path / "out"):
        used = open_model(str(place)).model().generation_config.to_diff_dict()
        del used["transformers_version"]
        assert used == {"bos_token_id": 0, "eos_token_id": [1, 319], "pad_token_id": 1}
    generated = mhconvert.generate(str(tmp_path / "out"), "The river", max_new_tokens=5)
    assert generated["new_tokens"] == 5


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("generation_config.json", {"max_new_tokens": -1}, "max_new_tokens"),
        ("generation_config.json", {"cache_implementation": "none of them"}, "cache_implementation"),
    ],
)
def test_what_would_not_load_is_refused_before_any_weight_is_read(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    changes: dict[str, Any],
    words: str,
) -> None:
    folder = make_donor(tmp_path / "donor")
    edit(folder / file, **changes)
    monkeypatch.setattr(safetensors_reader, "read_tensor", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(CheckpointError, match=rf"would not load with the {file} of .*{words}"):
        mhconvert.convert(recipe(tmp_path / "out", model=str(folder)))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("method", "settings"),
    [("mla", MLASettings()), ("mla", MLASettings(kv_bits="16")), ("dha", None), ("moh", None)],
)
def test_the_config_is_written_and_reloaded_before_any_weight_is_read(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, settings: Any
) -> None:
    written: list[set[str]] = []
    write = provenance.write_model_config

    def recorded(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        written.append(set(json.loads((folder / "config.json").read_text())))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(provenance, "write_model_config", recorded)
    asked = recipe(tmp_path / "out", method=method, settings=settings, fit_steps=0)
    mhconvert.convert(asked)
    example, final = written
    assert example == final
    written.clear()
    monkeypatch.setattr(safetensors_reader, "read_tensor", stop)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(recipe(tmp_path / "again", method=method, settings=settings))
    assert written == [example]


def test_a_token_that_is_no_number_is_refused_before_any_weight_is_read(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_donor(tmp_path / "donor")
    edit(folder / "generation_config.json", eos_token_id=[1, "</s>"])
    monkeypatch.setattr(safetensors_reader, "read_tensor", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(
        CheckpointError, match=r'generation_config\.json: eos_token_id\[1\]="</s>" is not a whole'
    ):
        mhconvert.convert(recipe(tmp_path / "out", model=str(folder)))
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


def test_a_padding_token_behind_the_vocabulary(tmp_path: Path) -> None:
    edit(make_donor(tmp_path) / "config.json", pad_token_id=320)
    with pytest.raises(
        CheckpointError, match=r"pad_token_id=320, and with vocab_size=320 the last token is 319"
    ):
        open_donor(str(tmp_path))
    edit(tmp_path / "config.json", pad_token_id=319)
    assert open_donor(str(tmp_path)).config.pad_token_id == 319


def test_a_quantisation_that_the_weights_do_not_have(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "donor")
    expected = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(9)[None]).logits
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    donor = open_donor(str(folder))
    assert torch.equal(donor.model("cpu")(torch.arange(9)[None]).logits, expected)
    assert donor.notice == "left aside: the quantization_config in its config.json, as its weights are plain"
    mhconvert.convert(recipe(tmp_path / "out", model=str(folder), fit_steps=0))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 1
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedError, match=r"quantised \(bitsandbytes\).* give its downloaded folder"):
        mhconvert.convert(recipe(tmp_path / "again", model=str(folder)))
