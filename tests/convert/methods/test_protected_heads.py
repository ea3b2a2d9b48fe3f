"""Protected heads: read from files, refused where they do not fit, and whole in what each method makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mhconvert
from mhconvert.convert import finished_conversion, pipeline
from mhconvert.convert.checkpoint.provenance import read_record
from mhconvert.convert.layer_pass import time_estimate
from mhconvert.convert.methods.dha.method import DHA
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.layer_sensitivity import LayerSensitivity, weighted
from mhconvert.convert.methods.mla.bit_allocation import DISTORTION, allocate
from mhconvert.convert.methods.mla.code_basis import LayerBases
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.method import MoH
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.methods.protected_heads import head_weights, read_protected
from mhconvert.convert.methods.registry import build_method
from mhconvert.convert.open_model import open_model
from mhconvert.convert.recipe.recipe import Calibration, Recipe, load_recipe
from mhconvert.convert.recipe.steps import Step
from mhconvert.errors import BudgetError, MhconvertError, OutputError, UnsupportedError
from mhconvert.eval.heads import measured_heads
from mhconvert.eval.heads.survey import Asked, survey
from mhconvert.progress import ignore
from tests.donors import make_config, make_donor

LAYERS, HEADS, GROUPS = 3, 8, 4
NAMED: list[list[int]] = [[], [5], [0, 7]]  # of 8 query heads; they read KV heads 2, and 0 and 3


def given(named: list[list[int]]) -> dict[str, Any]:
    return {"layers": [{"heads": heads} for heads in named]}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("protected") / "tiny"
    return make_donor(place, layers=LAYERS, heads=HEADS, kv_heads=GROUPS)


@pytest.fixture(scope="module")
def recipe(donor: Path, text: Path) -> Callable[..., Recipe]:
    def build(output: Path, method: str, settings: Any, **changes: Any) -> Recipe:
        options = {
            "calibration": Calibration((str(text),), tokens=1024, sequence_length=64, held_out=2),
            "fit_steps": 3,
            "verify": False,
            "device": "cpu",
        }
        return Recipe(str(donor), method, settings, output=str(output), **(options | changes))

    return build


@pytest.mark.parametrize("regroup", [True, False])
@pytest.mark.parametrize("fusion", ["closed", "trained"])
def test_dha_leaves_them_alone(
    recipe: Callable[..., Recipe], tmp_path: Path, regroup: bool, fusion: str
) -> None:
    """Exactly the donor's readers of a protected KV head read it, at the budget of a conversion without them."""
    settings = DHASettings(0.6, regroup=regroup, fusion=fusion, protect=given(NAMED))  # type: ignore[arg-type]
    report = mhconvert.convert(recipe(tmp_path / "kept", "dha", settings))
    free = DHASettings(0.6, regroup=regroup, fusion=fusion)  # type: ignore[arg-type]
    plain = mhconvert.convert(recipe(tmp_path / "free", "dha", free))
    left, without = (
        sum(layer["k_heads"] + layer["v_heads"] for layer in each["layers"]) for each in (report, plain)
    )
    assert left == without == 14  # of 24, 14.4
    groups = [sorted({head // 2 for head in heads}) for heads in NAMED]
    for layer, kept in zip(report["layers"], groups, strict=True):
        assert layer.get("protected_kv_heads", []) == kept
        for head_map in (layer["k_map"], layer["v_map"]):
            for group in kept:
                [fused] = {head_map[2 * group], head_map[2 * group + 1]}
                assert head_map.count(fused) == 2
    torn = [
        layer[f"{kind}_map"].count(layer[f"{kind}_map"][head]) != 2
        for layer, heads in zip(plain["layers"], NAMED, strict=True)
        for head in heads
        for kind in "kv"
    ]
    assert any(torn)  # without protection some of them are fused


@pytest.mark.parametrize("name", ["dha", "moh"])
def test_a_survey_measures_every_layer_at_its_share(name: str) -> None:
    """And at every share: a layer with protected heads is measured at the size that the share says."""
    config = make_config(layers=4, heads=8, kv_heads=4)
    protect = given([[0, 2], [], [], []])
    settings = (
        DHASettings(0.5, protect=protect) if name == "dha" else MoHSettings(0.5, 0.125, protect=protect)
    )
    whole = 8  # K and V heads of a donor's layer, or its query heads
    shares = build_method(name, config, settings, "default").survey_shares
    assert len(shares) > 2
    for share in shares:
        survey: Any = build_method(name, config, settings.at_budget(share), "survey")
        assert list(survey.heads if name == "dha" else survey.active) == [round(share * whole)] * 4
    planned: Any = build_method(name, config, settings, "default")
    assert planned.budget.kept[0] if name == "dha" else planned.kept[0]  # the conversion itself keeps them


@pytest.mark.parametrize("route", ["heads", "groups"])
def test_moh_gives_them_to_every_token(recipe: Callable[..., Recipe], tmp_path: Path, route: str) -> None:
    settings = MoHSettings(0.75, 0.25, route=route, protect=given(NAMED))  # type: ignore[arg-type]
    report = mhconvert.convert(recipe(tmp_path / "kept", "moh", settings))
    plain = mhconvert.convert(
        recipe(tmp_path / "free", "moh", MoHSettings(0.75, 0.25, route=route))  # type: ignore[arg-type]
    )
    assert report["active_heads"] == plain["active_heads"]
    share = 1 if route == "heads" else 2
    for layer, heads in zip(report["layers"], NAMED, strict=True):
        kept = {head // share for head in heads}
        assert kept <= set(layer["shared_heads"])
        assert layer["active_heads"] >= len(layer["shared_heads"]) == max(2 // share, len(kept))
    missing = [
        head // share not in layer["shared_heads"]
        for layer, heads in zip(plain["layers"], NAMED, strict=True)
        for head in heads
    ]
    assert any(missing)


def test_moh_shares_more_where_more_are_protected() -> None:
    config = make_config(layers=2, heads=8, kv_heads=4)
    made = MoH(config, MoHSettings(0.75, 0.25, protect=given([[1, 2, 3, 4, 5], []])), "default")
    assert made.budget.shared == (5, 2)
    assert sum(made.active) == 12


@pytest.mark.parametrize("bits", ["16", "auto"])
def test_mla_weighs_them_within_one_budget(recipe: Callable[..., Recipe], tmp_path: Path, bits: str) -> None:
    kept, free = (
        mhconvert.convert(
            recipe(
                tmp_path / name,
                "mla",
                MLASettings(0.3, kv_bits=bits, protect=protect),  # type: ignore[arg-type]
                effort="quick",
                fit_steps=0,
            )
        )
        for name, protect in (("kept", given(NAMED)), ("free", None))
    )
    key, named = ("weighted_heads", NAMED) if bits == "16" else ("weighted_kv_heads", [[], [2], [0, 3]])
    assert [layer.get(key, []) for layer in kept["layers"]] == named
    if bits == "16":
        assert kept["kv_bytes_per_token"] == free["kv_bytes_per_token"]
        assert (
            kept["layers"][0]["relative_error"] == free["layers"][0]["relative_error"]
        )  # it has none of them
    else:
        assert kept["kv_bytes_per_token"]["converted"] <= free["kv_bytes_per_token"]["converted"] + LAYERS


@pytest.mark.parametrize("seed", range(3))
def test_mla_errs_less_in_their_values(
    recipe: Callable[..., Recipe], tmp_path: Path, text: Path, seed: int
) -> None:
    """At one size, on the same hidden states; the other heads' values pay for it."""
    donor = make_donor(tmp_path / "donor", layers=1, heads=HEADS, kv_heads=GROUPS, seed=seed)
    of_donor = head_values(str(donor), text)
    errors, sizes = [], []
    for name, protect in (("kept", given([[4, 5]])), ("free", None)):
        settings = MLASettings(kv_lora_rank=24, qk_rope_head_dim=8, kv_bits="16", protect=protect)
        asked = recipe(tmp_path / name, "mla", settings, effort="quick", fit_steps=0)
        sizes.append(mhconvert.convert(replace(asked, model=str(donor)))["kv_bytes_per_token"])
        error = head_values(str(tmp_path / name), text) - of_donor
        errors.append((error - error.mean(0)).square().sum((0, 2)))  # o_proj has a bias for the mean
    kept, free = errors
    assert sizes[0] == sizes[1]
    assert kept[4:6].sum() < free[4:6].sum()
    assert kept.sum() - kept[4:6].sum() > free.sum() - free[4:6].sum()


def head_values(model: str, text: Path) -> torch.Tensor:
    """(T, H, D): the values that each head of the first layer reads, through o_proj, of the first 256 tokens."""
    opened = open_model(model, device="cpu")
    loaded = opened.model()
    attention = loaded.get_decoder().layers[0].self_attn
    seen: list[torch.Tensor] = []
    of_donor = hasattr(attention, "v_proj")
    read = attention.v_proj if of_donor else attention.kv_b_proj
    read.register_forward_hook(lambda _, __, output: seen.append(output.squeeze(1)[0]))
    ids = opened.tokenizer()(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :256]
    with torch.inference_mode():
        loaded(input_ids=ids, use_cache=False)
        columns = attention.o_proj.weight.unflatten(-1, (HEADS, -1))  # D H v
        heads = seen[0].unflatten(-1, (GROUPS if of_donor else HEADS, -1))[..., -columns.shape[2] :]  # T H v
        heads = heads.repeat_interleave(HEADS // heads.shape[1], dim=1)
        return torch.einsum("thv,dhv->thd", heads, columns)


@pytest.mark.parametrize("seed", range(4))
def test_codes_err_less_in_their_keys_and_values(seed: int) -> None:
    """Of KV head 1 of 4, in the price that its errors have: at the same bytes less is expected to be lost."""
    generator = torch.Generator().manual_seed(seed)
    heads, width = 4, 8
    elements = 2 * heads * width
    mixed = torch.randn(2, elements, elements, generator=generator, dtype=torch.float64)
    spectrum = torch.logspace(0, -2, elements, dtype=torch.float64)
    covariance, price = mixed * spectrum @ mixed.mT
    layer = LayerSensitivity(
        torch.zeros(elements, dtype=torch.float64), covariance, price.float(), torch.tensor(4096)
    )
    own = torch.arange(elements) // width % heads == 1

    def lost(weights: torch.Tensor | None) -> float:
        basis = LayerBases([layer], [weights])[0]
        [bits] = allocate([basis.divergence], 24)
        error = basis.up * torch.tensor(DISTORTION, dtype=torch.float64)[bits] @ basis.up.mT
        return float((price * error)[own][:, own].sum())

    assert lost(head_weights([1], heads)) < lost(None)


def test_weighted_prices_are_of_the_named_keys_and_values() -> None:
    price = torch.ones(8, 8)
    layer = LayerSensitivity(torch.zeros(8), torch.eye(8), price, torch.tensor(3))
    found = weighted(layer, torch.tensor([1.0, 4.0], dtype=torch.float64)).price
    named = torch.tensor([2, 3, 6, 7])  # of keys 0 … 3 and values 4 … 7, two elements a head
    assert torch.equal(found.diagonal()[named], torch.full((4,), 4.0))
    assert found[0, 2] == 2
    assert found[0, 4] == 1


def test_the_record_says_which_heads(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(json.dumps(given(NAMED)), encoding="utf-8")
    mhconvert.convert(recipe(tmp_path / "out", "moh", MoHSettings(protect=str(file))))
    recorded = read_record(tmp_path / "out")["recipe"]["settings"]["protect"]
    assert recorded == {"from": "heads.json"} | given(NAMED)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "Protected by the conversion: 3 heads (heads.json)." in card
    file.unlink()  # the recipe holds the heads, not the file's name alone
    assert load_recipe(tmp_path / "out" / "recipe.yaml").settings.protect == recorded


def test_a_word_is_measured_on_the_donor(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    mhconvert.convert(recipe(tmp_path / "out", "moh", MoHSettings(protect="safety")))
    record = read_record(tmp_path / "out")
    measured = mhconvert.inspect(record["recipe"]["model"], heads=True, device="cpu")["heads"]
    assert record["recipe"]["settings"]["protect"] == measured["protect"]["safety"]
    assert sum(len(layer["heads"]) for layer in measured["protect"]["safety"]["layers"]) == 2  # 5 % of 24
    for layer, said in zip(record["layers"], measured["protect"]["safety"]["layers"], strict=True):
        assert set(said["heads"]) <= set(layer["shared_heads"])


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The words that the donor is read for from here on; nothing is kept from before."""
    monkeypatch.setenv("MHCONVERT_EVAL_CACHE", str(tmp_path / "kept"))
    asked: list[str] = []

    def counted(reference: str, wanted: Asked, *others: Any) -> dict[str, Any]:
        asked.extend(wanted.kinds)
        return survey(reference, wanted, *others)

    monkeypatch.setattr(measured_heads, "survey", counted)
    return asked


def test_cheap_refusals_come_before_the_heads_are_measured(
    recipe: Callable[..., Recipe], tmp_path: Path, surveys: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists; choose another folder"):
        mhconvert.convert(recipe(tmp_path / "out", "moh", MoHSettings(protect="safety")))
    with pytest.raises(BudgetError, match="is 0 of 24 heads and"):
        mhconvert.convert(recipe(tmp_path / "new", "moh", MoHSettings(0.1, 0.1, protect="safety")))
    assert surveys == []


def test_heads_are_measured_once(
    recipe: Callable[..., Recipe], tmp_path: Path, surveys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run takes them, and so does the rest of an interrupted one; what is finished needs them not at all."""
    asked = recipe(tmp_path / "out", "moh", MoHSettings(protect="safety"), seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.whole_model, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mhconvert.convert(asked)
    assert surveys == ["safety"]
    mhconvert.convert(asked, resume=True)
    assert surveys == ["safety"]
    other = recipe(tmp_path / "other", "moh", MoHSettings(0.9, protect="safety"))
    mhconvert.convert(other)
    assert surveys == ["safety"]
    of = [read_record(tmp_path / name)["recipe"]["settings"]["protect"] for name in ("out", "other")]
    assert of[0] == of[1]
    assert finished_conversion.written(asked) == str(tmp_path / "out")
    assert finished_conversion.written(replace(asked, output=str(tmp_path / "other"))) is None


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_curve_measures_the_heads_of_a_word(
    recipe: Callable[..., Recipe], tmp_path: Path, surveys: list[str]
) -> None:
    asked = recipe(tmp_path / "out", "dha", DHASettings(protect="safety"), effort="quick", fit_steps=0)
    found = mhconvert.curve(asked, (0.75, 0.5))
    assert surveys == ["safety"]
    heads = found["recipe"]["settings"]["protect"]
    assert sum(len(layer["heads"]) for layer in heads["layers"]) == 2  # 5 % of 24, rounded up
    named = replace(asked, settings=replace(asked.settings, protect=heads))
    assert [point["kl"] for point in found["points"]] == [
        point["kl"] for point in mhconvert.curve(named, (0.75, 0.5))["points"]
    ]
    with pytest.raises(MhconvertError, match="a curve needs at least one budget"):
        mhconvert.curve(replace(asked, settings=DHASettings(protect="retrieval")), ())
    assert surveys == ["safety"]


def test_heads_of_a_converted_donor_are_those_of_the_first(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same numbers; where the first donor is gone, the plan says so."""
    asked, first, small = [], tmp_path / "first", tmp_path / "small"
    protect = {"from": "safety"} | given([[3]])

    def known(reference: str, *_: Any) -> dict[str, Any]:
        asked.append(reference)
        return {"protect": {"safety": protect}}

    monkeypatch.setattr(measured_heads, "survey", known)
    monkeypatch.setattr(time_estimate, "PROBE_SECONDS", 1e-4)
    monkeypatch.setenv("MHCONVERT_EVAL_CACHE", str(tmp_path / "kept"))
    make_donor(first, layers=1, kv_heads=2)
    pieces = Calibration((str(text),), tokens=128, sequence_length=64, held_out=2)
    how: dict[str, Any] = {"calibration": pieces, "effort": "quick", "verify": False, "device": "cpu"}
    routed = MoHSettings(protect="safety")
    mhconvert.plan(Recipe(str(first), methods=[Step("dha"), Step("moh", routed)], **how))
    assert asked == []
    mhconvert.convert(Recipe(str(first), "dha", DHASettings(0.75), output=str(small), **how))
    then = Recipe(str(small), "moh", routed, output=str(tmp_path / "out"), **how)
    assert measured_heads.with_measured_heads(then, ignore).settings.protect == protect
    assert asked == [str(first)]
    first.rename(tmp_path / "elsewhere")
    with pytest.raises(
        UnsupportedError, match=f"protect safety: .* {first} is not at hand; take heads.protect.s"
    ):
        mhconvert.plan(replace(then, output=str(tmp_path / "new")))


def test_a_donor_without_such_heads(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Random weights copy nothing; and a donor that reads short texts alone is not asked to."""
    short = make_donor(tmp_path / "short", max_position_embeddings=128)
    for model in (None, str(short)):
        asked = recipe(tmp_path / "out", "moh", MoHSettings(protect="retrieval"))
        asked = replace(asked, model=model) if model else asked
        with pytest.raises(BudgetError, match="protect retrieval: no head of .* was found to do that"):
            mhconvert.convert(asked)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DHASettings(protect="nothing.json"), "protect nothing.json is neither retrieval nor safety"),
        (lambda: MoHSettings(protect=[1, 2]), "protect is no list of layers such as {heads: [0, 3]}"),
        (lambda: MoHSettings(protect=given([[0], ["a"]])), "protect, layer 1: it needs a list of heads"),  # type: ignore[list-item]
        (lambda: MoHSettings(protect="safety", shared_heads="first"), "shares the first heads"),
        (lambda: DHASettings(protect="safety", uniform=True), "uniform has groups of one size"),
        (lambda: DHASettings(protect="safety", equal_heads=True), "equal_heads has groups of one size"),
        (lambda: DHASettings(protect="safety", plan=[{"kv_heads": 3}]), "leave out protect or the plan"),
    ],
)
def test_choices_that_exclude_it(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(BudgetError, match=words.replace("[", r"\[")):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda c: DHA(c, DHASettings(0.25, protect=given([[0, 2, 4], [], []])), "default"),
            r"kv_budget=0.25 is 6 of 24 heads, and with 3 protected KV heads layers have at least 12; "
            r"choose kv_budget ≥ 0.5 or protect fewer",
        ),
        (
            lambda c: DHA(c, DHASettings(0.5, max_heads=2, protect=given([[], [0, 2], []])), "default"),
            "layer 1: 2 KV heads are protected, and with one for the others that is more than the most it may have, 2",
        ),
        (
            lambda c: MoH(c, MoHSettings(0.25, 0.125, protect=given([list(range(6)), [4], [5]])), "default"),
            "active=0.25 is 6 of 24 heads and shared=0.125 takes 8 of them, 8 of which are protected",
        ),
        (
            lambda c: MoH(
                c, MoHSettings(0.5, 0.125, uniform=True, protect=given([list(range(5)), [], []])), "default"
            ),
            r"layer 0: 4 active heads, of which 5 are shared \(5 protected\)",
        ),
        (
            lambda c: MoH(c, MoHSettings(protect=given([[]])), "default"),
            "protect has 1 layers and the donor 3",
        ),
        (
            lambda c: DHA(c, DHASettings(protect=given([[], [8], []])), "default"),
            "protect, layer 1: there is no head 8 of the donor's 8",
        ),
    ],
)
def test_no_room(make: Callable[[Any], Any], words: str) -> None:
    config = make_config(layers=LAYERS, heads=HEADS, kv_heads=GROUPS)
    with pytest.raises(BudgetError, match=words):
        make(config)


@pytest.mark.parametrize(
    ("method", "settings", "named", "said"),
    [
        ("moh", MoHSettings(), [[], [5], []], "Protected by the conversion: 1 head (given)."),
        ("moh", MoHSettings(route="groups"), NAMED, "Protected by the conversion: 3 KV heads (given)."),
        ("dha", DHASettings(0.75), [[], [4, 5], []], "Protected by the conversion: 1 KV head (given)."),
        ("mla", MLASettings(kv_bits="16"), NAMED, "Weighed more by the conversion: 3 heads (given)."),
        ("mla", MLASettings(kv_bits="auto"), NAMED, "Weighed more by the conversion: 3 KV heads (given)."),
    ],
)
def test_the_card_says_what_was_done(
    recipe: Callable[..., Recipe], tmp_path: Path, method: str, settings: Any, named: Any, said: str
) -> None:
    settings = replace(settings, protect=given(named))
    mhconvert.convert(recipe(tmp_path / "out", method, settings, effort="quick", fit_steps=0))
    assert said in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_where_heads_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is given; a file has its name, however its path is spelled."""
    layers = given(NAMED)["layers"]
    assert read_protected(layers) == {"from": "given", "layers": layers}
    (tmp_path / "keep.json").write_text(json.dumps({"layers": layers}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    whole = tmp_path / "keep.json"
    for spelled in ("keep.json", "./keep.json", "~/keep.json", str(whole), whole):
        assert read_protected(spelled) == {"from": "keep.json", "layers": layers}
    with pytest.raises(BudgetError, match="protect ~nobody-here/keep.json is neither"):
        read_protected("~nobody-here/keep.json")


def test_what_is_read_reads_again_as_the_same() -> None:
    read = read_protected(given([[3, 1, 3], []]))
    assert read == {"from": "given", "layers": [{"heads": [1, 3]}, {"heads": []}]}
    assert read_protected(read) == read
