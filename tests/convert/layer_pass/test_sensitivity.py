"""The passes over the layers measure what one backward pass of the whole model does; conversions with coded latents."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhconvert
from mhconvert.convert import pipeline
from mhconvert.convert.calibration import calibration_rows
from mhconvert.convert.donor.donor import open_donor
from mhconvert.convert.layer_pass import backward, resumable_run, sensitivity
from mhconvert.convert.layer_pass.context import ConversionContext
from mhconvert.convert.layer_pass.sensitivity import (
    measure_sensitivities,
    pass_tokens,
    peak_bytes,
    stored_bytes,
    surveyed_rows,
    surveyed_shape,
)
from mhconvert.convert.layer_pass.stored_sensitivities import MomentFiles, Sensitivities
from mhconvert.convert.methods import layer_sensitivity
from mhconvert.convert.methods.layer_sensitivity import FIRST_TOKENS, LayerMoments, LayerSensitivity
from mhconvert.convert.methods.mla.code_basis import LayerBases, code_basis
from mhconvert.convert.methods.mla.coded_method import CodedMLA
from mhconvert.convert.methods.mla.latent_code import row_bytes
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.recipe import Recipe, load_recipe
from mhconvert.errors import BudgetError
from mhconvert.eval.fidelity import Fidelity
from mhconvert.heal.layer_fit import fit
from mhconvert.progress import ignore
from tests.convert.conftest import LAYERS
from tests.convert.conversions import token_ids
from tests.convert.methods.mla.coded_models import whole_model_sensitivities
from tests.convert.test_pipeline import hashes, stop_after
from tests.donors import make_config, make_donor, make_model

Build = Callable[..., Recipe]
CODED = MLASettings(kv_bits="auto", kv_budget=0.25)


def context_of(recipe: Recipe) -> ConversionContext:
    donor, device = open_donor(recipe.model), torch.device("cpu")
    rows = calibration_rows.draw(recipe, donor, device, ignore)
    return ConversionContext(recipe, donor, device, torch.float32, rows, fit, Fidelity, ignore)


def set_products(monkeypatch: pytest.MonkeyPatch, products: AbstractContextManager[Any]) -> None:
    for module, name in (
        (sensitivity, "half_layers"),
        (sensitivity, "half_products"),
        (backward, "half_layers"),
    ):
        monkeypatch.setattr(module, name, lambda _: products)


@pytest.fixture
def whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    set_products(monkeypatch, nullcontext())


@pytest.mark.usefixtures("whole_products")
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2", "qwen3"])
def test_layer_by_layer_is_the_whole_model(recipe: Build, tmp_path: Path, family: str) -> None:
    donor = str(make_donor(tmp_path / "donor", family=family, pad_token_id=1))
    context = context_of(dataclasses.replace(recipe(tmp_path / "out"), model=donor, settings=CODED))
    rows = surveyed_rows(context.rows.fit, 64)
    whole = context.donor.model("cpu")
    whole.get_input_embeddings().weight.requires_grad_(True)  # so that gradients flow at all
    expected = whole_model_sensitivities(whole, rows, context.recipe.seed)
    for found, wanted in zip(measure_sensitivities(context), expected, strict=True):
        for field in dataclasses.fields(found):
            one, other = (getattr(each, field.name).double() for each in (found, wanted))
            assert (one - other).norm() <= 1e-4 * other.norm(), field.name  # fp32 sums in another order


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_products_of_16_bits_change_the_prices_little(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The first layer's keys and values are exact: what hardly varies in them must not vary by rounding."""
    donor = str(make_donor(tmp_path / "donor", family=family, pad_token_id=1))
    context = context_of(dataclasses.replace(recipe(tmp_path / "out"), model=donor, settings=CODED))
    measured = []
    for products in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        set_products(monkeypatch, products)
        measured.append(measure_sensitivities(context))
    for index, (exact, rounded) in enumerate(zip(*measured, strict=True)):
        moved = (rounded.covariance - exact.covariance).norm() / exact.covariance.norm()
        assert moved < (1e-6 if index == 0 else 0.02)
        # Other tokens are drawn where a sum of probabilities is rounded to the other side: another sample.
        assert float(rounded.price.trace()) == pytest.approx(float(exact.price.trace()), rel=0.1)
    assert not torch.equal(measured[0][0].price, measured[1][0].price)


@pytest.mark.parametrize("index", [0, 1])
def test_a_small_error_costs_what_the_price_says(index: int) -> None:
    """½ E[eᵀ F e] of a random error in one layer's keys and values is the measured KL, but for the sample.

    The price is of drawn tokens, and nothing of it is clipped: 5 % of it are sampling error on 4,096 tokens.
    """
    donor, ids = make_model(make_config(vocab=64), std=0.05), token_ids(64, 64) % 64
    donor.get_input_embeddings().weight.requires_grad_(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_sensitivity, "CLIPPED", 1.0)
        price = whole_model_sensitivities(donor, ids)[index].price
    generator = torch.Generator().manual_seed(index)
    errors = 0.02 * torch.randn(64, 64, 64, generator=generator)
    errors[:, :FIRST_TOKENS] = 0  # which the price leaves out
    attention = donor.model.layers[index].self_attn
    parts = zip((attention.k_proj, attention.v_proj), errors.split(32, dim=-1), strict=True)
    with torch.no_grad():
        before = donor(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        hooks = [m.register_forward_hook(lambda _, __, out, e=e: out + e) for m, e in parts]
        after = donor(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    for hook in hooks:
        hook.remove()
    measured = (before.exp() * (before - after)).sum(-1).sum() / errors[:, FIRST_TOKENS:, 0].numel()
    said = 0.5 * 0.02**2 * price.double().trace()
    assert measured == pytest.approx(float(said), rel=0.1)


@pytest.mark.usefixtures("whole_products")
def test_several_passes_are_one(recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the gradients that are clipped: a pass clips its own."""
    context = context_of(dataclasses.replace(recipe(tmp_path / "out"), settings=CODED))
    monkeypatch.setattr(layer_sensitivity, "CLIPPED", 1.0)
    whole = measure_sensitivities(context)
    monkeypatch.setattr(sensitivity, "PASS_TOKENS", 3 * 64)
    parts = measure_sensitivities(context, tmp_path / "files")
    assert all(int(layer.tokens) == int(whole[0].tokens) > 3 * 64 for layer in parts)
    for found, wanted in zip(parts, whole, strict=True):
        for field in dataclasses.fields(found):
            one, other = (getattr(each, field.name).double() for each in (found, wanted))
            assert (one - other).norm() <= 1e-5 * other.norm(), field.name


@pytest.mark.parametrize(
    ("rows", "length", "elements", "read"),
    [
        (60, 512, 384, (60, 512)),
        (128, 512, 384, (60, 512)),
        (32, 2048, 384, (60, 512)),
        (32, 2048, 2048, (128, 512)),
        (1, 700, 64, (1, 512)),
        (2, 64, 64, (2, 64)),
    ],
)
def test_a_survey_reads_all_of_a_calibration_text_up_to_80_tokens_an_element(
    rows: int, length: int, elements: int, read: tuple[int, int]
) -> None:
    assert surveyed_shape(rows, length, elements) == read
    taken = surveyed_rows(torch.arange(rows * length).view(rows, length), elements)
    assert taken.shape == read
    assert taken.unique().numel() == taken.numel()
    first = torch.arange(rows * length).view(rows, length)[: len(taken), : read[1]]
    assert torch.equal(taken[: len(first)], first)  # the beginnings of all rows before any rest


def test_the_plan_counts_what_a_survey_holds_and_stores(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files to the byte, but for their names; the memory of an 8B donor by hand: 32 layers, 8 KV heads of 128."""
    sizes: dict[str, int] = {}
    share_out = resumable_run.Workspace.needs

    def measured(space: Any, survey: Any) -> Any:
        found = share_out(space, survey)
        sizes.update((path.name, path.stat().st_size) for path in space.texts.parent.glob("sensitivities/*"))
        return found

    monkeypatch.setattr(resumable_run.Workspace, "needs", measured)
    asked = dataclasses.replace(recipe(tmp_path / "out"), settings=CODED)
    mhconvert.convert(asked)
    assert len(sizes) == 5
    assert 0 < sum(sizes.values()) - stored_bytes(64, 5, 16, 64) < 5 * 1024
    plain = pipeline.plan(recipe(tmp_path / "out"))
    coded = pipeline.plan(asked)
    disk = [plan["disk_needed_bytes"] - plan["output_bytes"] for plan in (plain, coded)]
    streams = 2 * 4 * 64 * 15 * 64  # of all rows but one, which coded layers do not read
    assert disk[1] - disk[0] == stored_bytes(64, 5, 16, 64) - streams
    matrices = 32 * 2048**2 * (12 + 4)  # as many tokens are kept as there are elements
    assert stored_bytes(2048, 32, 80, 512) == pytest.approx(matrices, rel=1e-3)
    states = 5 * 2**28
    tokens = states // (4096 * 4 * 34)  # of one pass: 40,960 tokens are read, and 1.25 GiB of states kept
    part = tokens * 2048 * 8 * 6 + 4 * 2048**2 * 8
    assert peak_bytes(2048, 32, 4096, 80, 512) == pytest.approx(matrices / 16 + states + part, rel=1e-3)
    assert pass_tokens(30, 576) == 8192
    assert pass_tokens(80, 8192) == 4 * 16 * 8192**2 // (8192 * 4 * 82) > 1536  # Llama 3's 70B
    assert pass_tokens(4000, 4096) == 512


def test_one_layer_is_read_at_a_time(tmp_path: Path) -> None:
    moments = [LayerMoments(6) for _ in range(3)]
    for number, each in enumerate(moments, 1):
        each.add(*torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(number)))
    layers = [each.sensitivity() for each in moments]
    files = MomentFiles(tmp_path / "found")
    for index, gathered in enumerate(moments):
        files[index] = gathered
    stored = Sensitivities(files)
    stored.set_costs(iter([0.5, 0.25, 0.0]))
    assert [float(layer.replaced_cost) for layer in stored] == [0.5, 0.25, 0.0]
    stored.set_costs(iter([0.0] * 3))
    assert len(stored) == 3
    for found, wanted in zip(stored, layers, strict=True):
        for field in dataclasses.fields(found):
            assert torch.equal(getattr(found, field.name), getattr(wanted, field.name))
    asked: list[int] = []

    class Counted(list[LayerSensitivity]):
        def __getitem__(self, index: Any) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    bases = LayerBases(Counted(layers))
    assert torch.equal(bases[2].down, code_basis(layers[2]).down)
    assert asked == [2]


def test_too_little_text_is_told(recipe: Build, tmp_path: Path) -> None:
    few = dataclasses.replace(recipe(tmp_path / "out").calibration, tokens=64)
    asked = dataclasses.replace(recipe(tmp_path / "out"), settings=CODED, calibration=few)
    told: list[str] = []
    report = mhconvert.convert(asked, on_progress=lambda event: told.append(event.message))
    notice = "64 tokens are few for the 64 elements of keys and values in a layer; 1,280 are wanted"
    assert any(message.startswith(notice) for message in told)
    for facts in (report, pipeline.plan(asked)):
        assert facts["calibration"]["notice"].startswith(notice)
    enough = dataclasses.replace(few, tokens=128)
    plan = pipeline.plan(dataclasses.replace(asked, calibration=enough))
    assert "notice" not in plan["calibration"]


def test_a_layer_that_is_not_heard_gets_fewer_bytes(recipe: Build, tmp_path: Path) -> None:
    make_donor(tmp_path / "donor", layers=3)
    weights = load_file(tmp_path / "donor" / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= 0.01
    save_file(weights, tmp_path / "donor" / "model.safetensors", metadata={"format": "pt"})
    asked = dataclasses.replace(recipe(tmp_path / "out"), model=str(tmp_path / "donor"), settings=CODED)
    report = mhconvert.convert(asked)
    sizes = [layer["kv_code_bytes"] for layer in report["layers"]]
    assert sizes[1] < min(sizes[0], sizes[2]) / 2
    assert sum(sizes) <= 0.25 * 3 * 64 * 2


def test_the_report_has_the_bytes_of_the_cache_object(recipe: Build, tmp_path: Path) -> None:
    report = mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out"), settings=CODED, verify=True))
    planned = sum(layer["kv_code_bytes"] for layer in report["layers"])
    assert report["kv_bytes_per_token"]["converted"] == pytest.approx(planned, rel=0.02)
    assert report["verified"]["cache"]["bytes_per_token"] == planned
    assert report["verified"]["module"] == "transformers_modules"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mla_coded_llama"
    files = {"latent_code.py", "modeling_coded_mla.py", "modeling_mla.py", "configuration_coded_mla.py"}
    files |= {"coded_kernel.py", "modeling_coded_window.py", "first_tokens.py"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("effort", "rows"), [("default", 2), ("high", 16)])
def test_layers_are_converted_from_no_more_text_than_their_levels_need(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, rows: int
) -> None:
    """The survey has read all of it; where blocks are fitted, the layers read it too."""
    seen, stock = [], CodedMLA.convert
    monkeypatch.setattr(
        CodedMLA, "convert", lambda self, *a: seen.append(tuple(a[2].shape[:2])) or stock(self, *a)
    )
    monkeypatch.setattr(CodedMLA, "layer_tokens", 150)
    mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out"), settings=CODED, effort=effort))
    assert seen == [(rows, 64)] * LAYERS


def test_a_dry_run_with_a_survey_prints_the_bits(recipe: Build, tmp_path: Path) -> None:
    asked = dataclasses.replace(recipe(tmp_path / "out"), settings=CODED)
    plan = pipeline.plan(asked, surveyed=Fidelity)
    assert all(
        set(layer) == {"index", "kv_code_bytes", "kv_lora_rank", "components_by_bits"}
        for layer in plan["layers"]
    )
    assert plan["kv_bytes_per_token"]["converted"] == sum(layer["kv_code_bytes"] for layer in plan["layers"])
    assert "layers" in pipeline.plan(asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.6, 1.0])
def test_a_budget_above_the_largest_code_is_cut_to_it(recipe: Build, tmp_path: Path, share: float) -> None:
    asked = dataclasses.replace(recipe(tmp_path / "out"), settings=CODED.at_budget(share))
    plan = pipeline.plan(asked)
    assert plan["kv_bytes_per_token"]["converted"] == 5 * (1 + 64)
    assert "is cut to 325" in plan["notice"]
    surveyed = pipeline.plan(asked, surveyed=Fidelity)
    assert 0.9 * 325 < surveyed["kv_bytes_per_token"]["converted"] <= 325  # some hardly vary: they get fewer
    assert "notice" not in pipeline.plan(dataclasses.replace(asked, settings=CODED))


@pytest.mark.parametrize("share", [0.02, 0.0625, 0.25, 0.4, 0.5, 1.0])
def test_an_example_has_no_more_components_than_there_are(share: float) -> None:
    method = CodedMLA(make_config(), CODED.at_budget(share), "quick")
    counts = method.example_config().kv_code_counts
    assert all(0 < sum(layer) <= 64 for layer in counts)
    used = sum(map(row_bytes, counts))
    assert 0.85 * method.budget - 2 <= used <= method.budget


@pytest.mark.parametrize(
    ("given", "held"), [(16, "16"), ("16", "16"), (4, "4"), ("8", "8"), ("auto", "auto")]
)
def test_bits_may_be_a_number_or_text(given: Any, held: str, tmp_path: Path) -> None:
    assert MLASettings(kv_bits=given).kv_bits == held
    file = tmp_path / "recipe.yaml"
    file.write_text(f"donor: tiny\nmethod: mla\nsettings: {{kv_bits: {given}}}\n".replace("donor", "model"))
    assert load_recipe(file).settings.kv_bits == held


@pytest.mark.parametrize("given", [1, 9, 0, True, 4.5, "x"])
def test_other_bits_are_refused(given: Any) -> None:
    with pytest.raises(BudgetError, match=rf"kv_bits '{given}' is not one of 16, auto, 2, 3, 4, 5, 6, 7, 8$"):
        MLASettings(kv_bits=given)


def test_all_components_have_the_bits_that_were_asked_for(recipe: Build, tmp_path: Path) -> None:
    four = MLASettings(kv_bits=4, kv_budget=0.125)
    report = mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out"), settings=four))
    assert {tuple(layer["components_by_bits"]) for layer in report["layers"]} == {("4",)}
    assert 0.95 * 80 < sum(layer["kv_code_bytes"] for layer in report["layers"]) <= 80
    capped = pipeline.plan(dataclasses.replace(recipe(tmp_path / "o"), settings=four.at_budget(0.5)))
    assert capped["kv_bytes_per_token"]["converted"] == 5 * (1 + 32)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_headers_have_room_for_every_tensor(
    recipe: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The shards' headers are reserved for a number of tensors, which is not below what is written."""
    reserved: list[int] = []

    class Counted(resumable_run.ShardWriter):
        def __init__(self, folder: Path, limit: int, tensors: int, *state: Any):
            reserved.append(tensors)
            super().__init__(folder, limit, tensors, *state)

    monkeypatch.setattr(resumable_run, "ShardWriter", Counted)
    donor = str(make_donor(tmp_path / "donor", family=family, pad_token_id=1))
    mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out"), model=donor, settings=CODED))
    written = sum(len(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors"))
    assert written <= reserved[0]


def test_a_plan_is_saved_edited_and_used(recipe: Build, tmp_path: Path) -> None:
    asked = dataclasses.replace(recipe(tmp_path / "out"), settings=CODED)
    file = tmp_path / "plan.json"
    plan = pipeline.plan(asked, surveyed=Fidelity)
    file.write_text(json.dumps(plan))
    mhconvert.convert(asked)
    same = MLASettings(kv_bits="auto", kv_budget=0.25, plan=str(file))
    mhconvert.convert(dataclasses.replace(asked, settings=same, output=str(tmp_path / "same")))
    names = [name for name in hashes(tmp_path / "out") if name.endswith(".safetensors")]
    one, other = hashes(tmp_path / "out"), hashes(tmp_path / "same")
    assert names
    assert [one[name] for name in names] == [other[name] for name in names]
    plan["layers"][1]["components_by_bits"] = {"8": 2, "3": 5}
    edited = dataclasses.replace(asked, settings=dataclasses.replace(same, plan=plan["layers"]))
    report = mhconvert.convert(dataclasses.replace(edited, output=str(tmp_path / "edited")))
    assert report["layers"][1]["components_by_bits"] == {"8": 2, "3": 5}
    again = load_recipe(tmp_path / "edited" / "recipe.yaml").settings
    assert again == edited.settings


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"4": 8}] * 3, "the plan has 3 layers and the donor 2"),
        ([{"4": 8}, {"9": 8}], "plan, layer 1: 9 is no number of bits; use 1, 2,"),
        ([{"4": 8}, {"4": 60, "1": 5}], "plan, layer 1: 65 components; the donor's layers have from 1 to 64"),
        ([{"4": 8}, {}], "plan, layer 1: 0 components"),
        ([{"4": 8}, {"4": -1}], "plan, layer 1: -1 components of 4 bits is not a whole number from 0"),
        ([{"4": 8}, {"4": "many"}], "plan, layer 1: 'many' components of 4 bits"),
        ([{"8": 40}, {"8": 40}], "plan, layer 1: 82 bytes a token up to here are over the budget of 64"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(layers: list[dict[str, Any]], message: str) -> None:
    plan = [{"components_by_bits": layer} for layer in layers]
    with pytest.raises(BudgetError, match=f"^{message}"):
        CodedMLA(make_config(), dataclasses.replace(CODED, plan=plan), "quick")


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "kv.json").write_text('{"layers": [{"kv_heads": 3}]}')
    plan = [{"components_by_bits": {"4": 8}}]
    for given, message in (
        (str(tmp_path / "plan.json"), 'is not JSON with {"layers"'),
        (str(tmp_path / "none.json"), "cannot be read: No such file"),
        ([{"kv_heads": 3}], "plan, layer 0: it needs components_by_bits"),
        (3, "plan is no list of layers such as {components_by_bits: {8: 4, 2: 90}}, and no file"),
        (str(tmp_path / "kv.json"), r"plan .*kv\.json, layer 0: it needs components_by_bits"),
    ):
        with pytest.raises(BudgetError, match=message):
            dataclasses.replace(CODED, plan=given)
    with pytest.raises(BudgetError, match="use it with kv_bits auto"):
        MLASettings(kv_bits="16", plan=plan)
    with pytest.raises(BudgetError, match="the plan fixes the KV budget"):
        dataclasses.replace(CODED, plan=plan).at_budget(0.5)


def test_an_interrupted_conversion_goes_on_with_the_same_bytes(recipe: Build, tmp_path: Path) -> None:
    whole, parts = (
        dataclasses.replace(recipe(tmp_path / name), settings=CODED) for name in ("whole", "parts")
    )
    mhconvert.convert(whole)
    with pytest.raises(KeyboardInterrupt):
        mhconvert.convert(parts, on_progress=stop_after(1, KeyboardInterrupt()))
    mhconvert.convert(parts, resume=True)
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")
