"""The pass from end to end on tiny donors: what it writes, what it promises, and how it goes on after a stop."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.convert import finished_conversion, pipeline
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.layer_pass import layer_steps, resumable_run
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe, load_recipe
from mhconvert.convert.storage import output_folder, shard_writer
from mhconvert.errors import CheckpointError, MhconvertError, OutputError, TextError
from mhconvert.progress import Progress
from tests.convert.conftest import LAYERS
from tests.donors import make_donor


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}


def stop_after(layers: int, error: BaseException) -> Callable[[Progress], None]:
    def listen(event: Progress) -> None:
        if event.stage == "layers" and event.done == layers:
            raise error

    return listen


def test_a_whole_folder_with_measured_numbers(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    report = mhconvert.convert(recipe(tmp_path / "out", verify=True))
    assert not (tmp_path / "out.partial").exists()
    elements = LAYERS * 2 * 2 * 16  # layers · (K and V) · heads · head_dim
    assert report["kv_bytes_per_token"] == {"donor": elements * 4, "converted": elements * 4 / 2}
    assert report["verified"]["cache"]["elements_per_token"] == elements / 2
    assert report["verified"]["relative_logit_error"] < 1e-5  # float32, five layers
    assert [layer["index"] for layer in report["layers"]] == list(range(LAYERS))
    for layer in report["layers"]:
        assert layer["kv_lora_rank"] + layer["qk_rope_head_dim"] == layer["kv_elements"]["converted"]
        assert 0 <= layer["relative_error"] < 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["qk_nope_head_dim"] == [layer["qk_nope_head_dim"] for layer in report["layers"]]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kl"] == report["kl"]
    provenance = json.loads((tmp_path / "out" / "mhconvert.json").read_text())
    assert hashes(tmp_path / "out").items() <= provenance["sha256"].items()
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe(tmp_path / "out", verify=True)


def test_the_donors_other_tensors_are_unchanged(
    recipe: Callable[..., Recipe], donor: Path, tmp_path: Path
) -> None:
    mhconvert.convert(recipe(tmp_path / "out"))
    before, after = load_file(donor / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name in before if ".self_attn." not in name}
    assert kept == {name for name in after if ".self_attn." not in name}
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_a_full_budget_is_the_donor(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = recipe(tmp_path / "out", settings=MLASettings(kv_budget=1.0, kv_bits="16"), fit_steps=0)
    report = mhconvert.convert(whole)
    assert report["kl"] < 1e-6
    assert report["top1_agreement"] == 1
    assert max(layer["relative_error"] for layer in report["layers"]) < 1e-9


def test_divergence_falls_as_the_budget_grows(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    divergences = [
        mhconvert.convert(
            recipe(tmp_path / str(share), settings=MLASettings(share, kv_bits="16"), fit_steps=0)
        )["kl"]
        for share in (0.125, 0.5, 0.875)
    ]
    assert divergences == sorted(divergences, reverse=True)


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_resume_gives_the_same_bytes(recipe: Callable[..., Recipe], tmp_path: Path, shard: str) -> None:
    options = {"max_shard_size": shard}
    mhconvert.convert(recipe(tmp_path / "whole", **options))
    cut = recipe(tmp_path / "cut", **options)
    for layers, resume in ((2, False), (4, True)):
        with pytest.raises(KeyboardInterrupt):
            mhconvert.convert(cut, resume=resume, on_progress=stop_after(layers, KeyboardInterrupt()))
        assert not (tmp_path / "cut").exists()
        assert (tmp_path / "cut.partial").is_dir()
    first: list[int] = []
    report = mhconvert.convert(
        cut, resume=True, on_progress=lambda e: first.append(e.done) if e.stage == "layers" else None
    )
    assert first[0] > 0  # it did not begin again
    assert [layer["index"] for layer in report["layers"]] == list(range(LAYERS))
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("cut", "whole")]
    assert configs[0]["qk_nope_head_dim"] == configs[1]["qk_nope_head_dim"]
    assert min(configs[0]["qk_nope_head_dim"]) < 16
    assert len(hashes(tmp_path / "cut")) == (
        1 if shard == "5GB" else len(list((tmp_path / "whole").glob("*.safetensors")))
    )


def test_an_interrupted_run_is_not_overwritten_unasked(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    cut = recipe(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(cut, on_progress=stop_after(2, KeyboardInterrupt()))
    with pytest.raises(OutputError, match=r"holds an interrupted run .* --resume continues it"):
        mhconvert.convert(cut)
    with pytest.raises(OutputError, match=r"started with another seed"):
        mhconvert.convert(recipe(tmp_path / "cut", seed=9), resume=True)
    assert (tmp_path / "cut.partial").is_dir()  # refused, not deleted
    mhconvert.convert(cut, force=True)
    assert (tmp_path / "cut").is_dir()


def test_an_interrupted_run_goes_on_with_its_own_donor_alone(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumable_run, "COMMIT_SHARE", 1e9)  # every layer is kept, on a busy machine too
    make_donor(tmp_path / "donor")
    cut = recipe(tmp_path / "cut", model=str(tmp_path / "donor"), effort="quick", fit_steps=0)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(cut, on_progress=stop_after(1, KeyboardInterrupt()))
    make_donor(tmp_path / "donor", seed=4)
    with pytest.raises(OutputError, match="cut.partial was started with another donor; --resume needs the"):
        mhconvert.convert(cut, resume=True)
    shutil.rmtree(tmp_path / "donor")
    make_donor(tmp_path / "donor")
    state = json.loads((tmp_path / "cut.partial" / "work" / "state.json").read_text())
    assert len(state["layers"]) == 1  # refused, and nothing of it changed
    assert mhconvert.convert(cut, resume=True)["layers"][0]["seconds"] == state["layers"][0]["seconds"]

    make_donor(tmp_path / "donor", seed=4)
    assert finished_conversion.differing(tmp_path / "cut", cut) == "donor"
    record = tmp_path / "cut" / "mhconvert.json"
    facts = json.loads(record.read_text())
    assert len(facts.pop("model_fingerprint")) == 64
    record.write_text(json.dumps(facts))  # as earlier versions wrote it
    assert finished_conversion.is_result(tmp_path / "cut", cut)


def test_a_full_disk_keeps_what_is_finished(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mhconvert.convert(recipe(tmp_path / "whole"))
    add, calls = shard_writer.ShardWriter.add, []

    def full(self: shard_writer.ShardWriter, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if ".layers.3." in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.ShardWriter, "add", full)
        with pytest.raises(OutputError, match=r"the disk is full; 3 layers .* --resume"):
            mhconvert.convert(recipe(tmp_path / "cut"))
    mhconvert.convert(recipe(tmp_path / "cut"), resume=True)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_too_little_disk_is_seen_before_work(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = output_folder.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(OutputError, match=r"1\.05 MB free and the conversion needs"):
        mhconvert.convert(recipe(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_nan_weight_leaves_nothing(text: Path, tmp_path: Path) -> None:
    folder = make_donor(tmp_path / "bad", layers=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    part = Calibration((str(text),), tokens=512, sequence_length=64)
    plain = MLASettings(kv_bits="16")
    bad = Recipe(str(folder), "mla", plain, output=str(tmp_path / "out"), calibration=part, fit_steps=0)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        mhconvert.convert(bad)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_weights_written_in_another_dtype_are_the_ones_measured(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    report = mhconvert.convert(recipe(tmp_path / "out", dtype="bfloat16", verify=True))
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert report["verified"]["relative_logit_error"] < 1e-5  # computed in float32 from the rounded weights
    assert report["kv_bytes_per_token"]["converted"] == LAYERS * 2 * 2 * 16 / 2 * 2


@pytest.mark.parametrize("head_dim", [64, 128])
def test_portable_is_one_rank_and_one_series(
    recipe: Callable[..., Recipe], tmp_path: Path, head_dim: int
) -> None:
    donor = make_donor(tmp_path / "donor", layers=2, head_dim=head_dim)
    settings = MLASettings(kv_budget=0.5, profile="portable")
    mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out", settings=settings), model=str(donor)))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kv_lora_rank"] == 2 * head_dim - 64  # half of 2 · 2 · head_dim elements
    assert config["rope_frequencies"] == [list(range(32))] * 2
    assert config["qk_nope_head_dim"] == config["v_head_dim"] == head_dim
    assert config["attention_output_bias"] is False


def test_a_dry_run_agrees_with_the_run(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    planned = pipeline.plan(recipe(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    report = mhconvert.convert(recipe(tmp_path / "out", verify=True))
    assert planned["kv_bytes_per_token"] == report["kv_bytes_per_token"]
    assert planned["parameters"]["donor"] == report["parameters"]["donor"]
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.9 * written < planned["output_bytes"] < 1.3 * written
    assert planned["disk_needed_bytes"] > sum(f.stat().st_size for f in (tmp_path / "out").iterdir())


def test_existing_output_stays_as_it_is(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match=r"is no checkpoint, and --force replaces nothing else"):
        mhconvert.convert(recipe(tmp_path / "out"), force=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"exists; choose another folder with -o, or replace it with --force"
    ):
        mhconvert.convert(recipe(tmp_path / "out"))
    assert (tmp_path / "out" / "mine").read_text() == "x"
    mhconvert.convert(recipe(tmp_path / "out"), force=True)
    assert not (tmp_path / "out" / "mine").exists()


def test_another_version_does_not_continue_a_run(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = recipe(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(cut, on_progress=stop_after(2, KeyboardInterrupt()))
    monkeypatch.setattr(resumable_run, "versions", lambda: {"torch": "0.0"})
    with pytest.raises(OutputError, match=r"was started with torch .*, and this is 0\.0"):
        mhconvert.convert(cut, resume=True)
    assert (tmp_path / "cut.partial").is_dir()


def test_a_layer_without_output_stays_without(text: Path, tmp_path: Path) -> None:
    """Depth-upscaled models have layers whose o_proj is zero: there is nothing to fit, and nothing is lost."""
    folder = make_donor(tmp_path / "upscaled", layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    part = Calibration((str(text),), tokens=512, sequence_length=64)
    report = mhconvert.convert(
        Recipe(
            str(folder),
            "mla",
            MLASettings(kv_bits="16"),
            output=str(tmp_path / "out"),
            calibration=part,
            fit_steps=3,
        )
    )
    assert report["layers"][1]["relative_error"] == 0
    assert report["verified"]["relative_logit_error"] < 1e-5


def test_missing_text_is_seen_before_the_weights(donor: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.txt")
    with pytest.raises(TextError, match=r"absent\.txt cannot be read: there is no such file"):
        pipeline.plan(
            Recipe(str(donor), "mla", MLASettings(kv_bits="16"), calibration=Calibration((absent,)))
        )


def test_an_absurd_error_stops_with_the_layer(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_steps, "relative_error", lambda *_: float("nan"))
    with pytest.raises(MhconvertError, match=r"layer 0: the converted attention's relative error is nan"):
        mhconvert.convert(recipe(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_high_effort_mends_what_the_layers_before_have_changed(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The whole block's fit on the student's stream, on the same text and behind the same steps, comes nearer to the
    donor; random layers that follow each other have little to mend."""
    options = {"fit_steps": 30, "settings": MLASettings(kv_budget=0.25, kv_bits="16")}
    tokens = Calibration(recipe(tmp_path).calibration.sources, tokens=8192, sequence_length=64, held_out=8)
    found = []
    for rounds in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(layer_steps.BLOCK_ROUNDS, "high", rounds)
            high = recipe(tmp_path / str(rounds), effort="high", calibration=tokens, **options)
            found.append(mhconvert.convert(high)["kl"])
    assert found[1] < 0.97 * found[0]


def test_high_effort_resumes_to_the_same_bytes(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    mhconvert.convert(recipe(tmp_path / "whole", effort="high"))
    cut = recipe(tmp_path / "cut", effort="high")
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(cut, on_progress=stop_after(3, KeyboardInterrupt()))
    mhconvert.convert(cut, resume=True)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2"])
def test_the_norm_behind_each_layer_is_the_one_that_reads_it(tmp_path: Path, family: str) -> None:
    donor = open_donor(str(make_donor(tmp_path / "tiny", family=family, layers=3)))
    model, hidden = donor.model("cpu"), torch.randn(2, 5, 64)
    for index in range(3):
        found = donor.norm_behind(index, "cpu")(hidden)
        if index == 2:
            expected = model.model.norm(hidden)
        elif family == "olmo2":
            expected = hidden
        else:
            expected = model.model.layers[index + 1].input_layernorm(hidden)
        assert torch.equal(found, expected)
