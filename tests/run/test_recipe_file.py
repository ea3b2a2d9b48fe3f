"""A run as a file: what it says survives, and what it says wrongly is named with file, line and key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Recipe, load_recipe
from mhconvert.convert.validation.option import declared
from mhconvert.errors import MhconvertError, RecipeError
from mhconvert.eval.settings import EvalSettings
from mhconvert.run.stage_settings import ExportStage, PushStage, export_fault
from mhconvert.run.whole_recipe import RunRecipe, load

WHOLE = """\
# A run with every stage.
model: smollm2-135m
method: mla
settings:
  kv_budget: 3e-1
calibration:
  sources: [self]
heal:
  tokens: 20M
  lr: 1e-3
eval:
  suite: quick
  tasks: piqa
export:
  to: own
push:
  repo: someone/model
"""
EXPORT_KEYS = "dtype, duplicate, engine, kind, output, pad_row, to"
MLA_KEYS = "kv_bits, kv_budget, kv_lora_rank, plan, profile, protect, qk_rope_head_dim"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("run.yaml")


def message(path: Path, text: str, overrides: Sequence[str] = ()) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load(path, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_every_stage_is_read(file: Path) -> None:
    file.write_text(WHOLE, encoding="utf-8")
    recipe = load(file)
    assert recipe == RunRecipe(
        Recipe("smollm2-135m", "mla", MLASettings(0.3), heal=HealSettings(tokens=20_000_000, lr=1e-3)),
        EvalSettings(suite="quick", tasks=("piqa",)),
        ExportStage("own"),
        PushStage("someone/model"),
    )
    assert recipe.stages == ("convert", "heal", "eval", "export", "push")
    assert recipe.summary() == (
        "convert smollm2-135m with mla (kv_budget=0.3), heal on 20,000,000 tokens, evaluate quick, piqa, export to "
        "own, push to someone/model"
    )
    assert load_recipe(file) == recipe.convert
    assert RunRecipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("was", "becomes", "expected"),
    [
        (
            "kv_budget",
            "kv_buget",
            f"line 5: settings has no key 'kv_buget'; did you mean kv_budget or kv_bits? (it has {MLA_KEYS})",
        ),
        ("kv_budget", "rank", f"line 5: settings has no key 'rank'; it has {MLA_KEYS}"),
        (
            "3e-1",
            "3",
            "line 5: settings.kv_budget=3 is outside (0, 1]; it is a share of the donor's KV cache",
        ),
        ("3e-1", "many", "line 5: settings.kv_budget: 'many' is not a number"),
        ("3e-1", ".nan", "line 5: settings.kv_budget: nan is not a number"),
        ("[self]", "[self, 5]", "line 7: calibration.sources: 5 is not text"),
        ("[self]", "[self]\n  tokens: 1.5", "line 8: calibration.tokens: 1.5 is not a whole number"),
        ("20M", "lots", "line 9: heal.tokens 'lots' is not a number of tokens such as 200k or 20M"),
        ("20M", "[1]", "line 9: heal.tokens: [1] is not a whole number or text"),
        (
            "tokens: 20M",
            "clip: 1",
            "line 8: there is nothing to do; say how many tokens to heal on, for example 20M",
        ),
        (
            "quick",
            "slow",
            "line 12: eval.suite: 'slow' is not one of quick, standard, transmla, moh, dha, open-llm, generation",
        ),
        ("piqa", "[piqa, '']", "line 13: eval.tasks has an empty name"),
        ("tasks: piqa", "limit: 0", "line 13: eval.limit=0 is too small; use at least 1"),
        ("tasks: piqa", "chat_template: maybe", "line 13: eval.chat_template: 'maybe' is not true or false"),
        (
            "to: own",
            "too: own",
            f"line 15: export has no key 'too'; did you mean to? (it has {EXPORT_KEYS}); run.yaml, line 14: export: "
            "the key 'to' is missing",
        ),
        (
            "to: own",
            "to: own\n  pad_row: 500",
            "line 16: export.pad_row: 500 is not one of 320, 512, 576",
        ),
        (
            "to: own",
            "to: own\n  engine: tgi",
            "line 16: export.engine: 'tgi' is not one of vllm, sglang, llama.cpp, transformers",
        ),
        (
            "to: own",
            "to: own\n  kind: q8_0",
            "line 16: export.kind does not apply to an export of mla to own; leave it out",
        ),
        (
            "to: own",
            "to: auto\n  duplicate: true",
            "line 16: export.duplicate does not apply to an export of mla to auto; leave it out",
        ),
        ("to: own", "output: x", "line 14: export: the key 'to' is missing"),
        ("export:\n  to: own", "export: own", "line 14: export: 'own' is not a mapping of settings"),
        ("model: smollm2-135m", "model:", "line 2: model: null is not text"),
        ("model: smollm2-135m\n", "", "the key 'model' is missing"),
        (
            "method: mla\n",
            "",
            "the method is missing; choose one of mla, dha, moh, swa, mla+swa, hybrid, hydra",
        ),
        (
            "mla",
            "mlaa",
            "line 3: unknown method 'mlaa'; choose one of mla, dha, moh, swa, mla+swa, hybrid, hydra",
        ),
        ("own\n", "own\nfit_steps: many\n", "line 16: fit_steps: 'many' is not a whole number"),
        ("own\n", "own\neffort: some\n", "line 16: effort: 'some' is not one of quick, default, high"),
        ("own\n", "own\nexport: {to: x}\n", "line 16: export is given twice, first in line 14"),
        ("  lr", "  tokens", "line 10: heal.tokens is given twice, first in line 9"),
    ],
)
def test_a_fault_has_its_line(file: Path, was: str, becomes: str, expected: str) -> None:
    assert was in WHOLE
    said = message(file, WHOLE.replace(was, becomes, 1))
    place = (
        "run.yaml, "
        if expected.startswith("line ")
        else "run.yaml: recipe: "
        if "'model'" in expected
        else "run.yaml: "
    )
    assert said == place + expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            WHOLE.replace("  lr", "\tlr"),
            "run.yaml, line 10 cannot be read: found character '\\t' that cannot start any token (indent with spaces)",
        ),
        ("model: [", "run.yaml, line 1 cannot be read: expected the node content, but found '<stream end>'"),
        ("a: b\n---\nc: d\n", "run.yaml, line 2 cannot be read: but found another document"),
        ("- a\n- b", "run.yaml is not a mapping of settings"),
        ("", "run.yaml is not a mapping of settings"),
        ("a: *b", "run.yaml, line 1 cannot be read: found undefined alias 'b'"),
        ("a: !!python/name:os.system", None),
        ("[a]: b\n? {c: d}\n: e", None),
        ("model: 2001-99-99", None),
        ("a: \x00", None),
        ("[" * 5000, None),
    ],
)
def test_what_is_no_yaml(file: Path, text: str, expected: str | None) -> None:
    said = message(file, text)
    assert said == expected if expected else said.startswith("run.yaml")


def test_a_file_that_is_not_there_or_not_text(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"^run\.yaml cannot be read: No such file or directory$"):
        load(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match=r"^run\.yaml cannot be read: it is not UTF-8 text$"):
        load(file)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        (4, "run.yaml, line 3: recipe has no key 'l0'; it has calibration,"),
        (25, "run.yaml cannot be read: its aliases unfold to too many values; write them out"),
    ],
)
def test_what_aliases_repeat_is_bounded(file: Path, levels: int, said: str) -> None:
    layers = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, levels))
    assert message(file, f"model: x\nmethod: mla\nl0: &l0 [a]\n{layers}").startswith(said)


def test_anchors_and_merged_keys(file: Path) -> None:
    file.write_text(
        "model: x\nmethod: mla\nheal: &h {tokens: 5, data: a.txt}\neval: {text: a.txt}\n", encoding="utf-8"
    )
    assert load(file).convert.heal == HealSettings(tokens=5, data={"a.txt": 1.0})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heal.tokens=1B", {"heal": {"tokens": 10**9}}),
        ("settings.kv_budget=0.25", {"settings": {"kv_budget": 0.25}}),
        ("settings.kv_budget=25e-2", {"settings": {"kv_budget": 0.25}}),
        ("calibration.sources=[a, b]", {"calibration": {"sources": ["a", "b"]}}),
        ("calibration.sources=a", {"calibration": {"sources": ["a"]}}),
        ("eval.limit=20", {"eval": {"limit": 20}}),
        ("eval.text=[a.txt]", {"eval": {"text": ["a.txt"]}}),
        ("heal.loss={kl: 1, ce: 0.1}", {"heal": {"loss": {"kl": 1, "ce": 0.1}}}),
        ("heal.data.self=2", {"heal": {"data": {"self": 2}}}),
        ("fit_steps=1e2", {"fit_steps": 100}),
        ("push.repo=a/b=c", None),
        ("output=out=1", {"output": "out=1"}),
    ],
)
def test_overrides(file: Path, override: str, expected: dict[str, Any] | None) -> None:
    file.write_text(WHOLE, encoding="utf-8")
    if expected is None:
        with pytest.raises(
            RecipeError, match="^--set push.repo=a/b=c: push.repo 'a/b=c' is no name of a repository: "
        ):
            load(file, [override])
        return
    plain = load(file, [override]).to_dict()
    for key, value in expected.items():
        found = plain[key]
        assert {k: found[k] for k in value} == value if isinstance(value, dict) else found == value


def test_overrides_take_stages_out_and_begin_them(file: Path) -> None:
    file.write_text(WHOLE, encoding="utf-8")
    assert load(file, ["push=null", "heal=null", "eval=null"]).stages == ("convert", "export")
    file.write_text("model: x\nmethod: moh\nheal:\n", encoding="utf-8")
    began = load(file, ["eval.suite=moh", "heal.tokens=5k", "push.repo=name", "heal.tokens=6k"])
    assert began.stages == ("convert", "heal", "eval", "push")
    assert began.convert.heal == HealSettings(tokens=6000)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heal.tokens=", "--set heal.tokens= has no value; null is the value of what is to be left out"),
        ("heal.tokens", "--set heal.tokens is not key=value; for example heal.tokens=1B"),
        (".tokens=1", "--set .tokens=1 is not key=value; for example heal.tokens=1B"),
        ("a=[", "--set a=[ cannot be read: expected the node content, but found '<stream end>'"),
        ("model.x=1", "--set model.x=1: model is not a mapping of settings"),
        (
            "settings.kv_buget=0.1",
            "--set settings.kv_buget=0.1: settings has no key 'kv_buget'; did you mean kv_budget or kv_bits? "
            f"(it has {MLA_KEYS})",
        ),
        ("fit_steps=many", "--set fit_steps=many: fit_steps: 'many' is not a whole number"),
        ("eval.limit=0", "--set eval.limit=0: eval.limit=0 is too small; use at least 1"),
        (
            "eval={limit: 3}",
            "--set eval={limit: 3}: there is nothing to evaluate; name a suite, tasks or text, or set retrieval, "
            "generation or refusals: true",
        ),
        (
            "heal={token: 3}",
            "--set heal={token: 3}: heal has no key 'token'; did you mean tokens or lm_tokens? (it has ",
        ),
        (
            "method=hydra",
            "run.yaml, line 5: settings has no key 'kv_budget'; it has dropout, r_par, r_seq, scale, targets",
        ),
    ],
)
def test_overrides_that_are_refused(file: Path, override: str, expected: str) -> None:
    assert message(file, WHOLE, [override]).startswith(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {},
            "there is nothing to evaluate; name a suite, tasks or text, or set retrieval, generation or refusals: true",
        ),
        (
            {"suite": "slow"},
            "suite 'slow' is not one of quick, standard, transmla, moh, dha, open-llm, generation",
        ),
        ({"suite": "quick", "backend": "x"}, "backend 'x' is not one of hf, vllm"),
        ({"retrieval": True, "sequence_length": 4}, "sequence_length=4 is too small; use at least 8"),
        ({"text": "a.txt", "num_fewshot": -1}, "num_fewshot=-1 is too small; use at least 0"),
    ],
)
def test_an_evaluation_that_cannot_be(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        EvalSettings(**values)
    assert str(caught.value) == expected


def test_exports_and_pushes_that_cannot_be() -> None:
    with pytest.raises(RecipeError, match="^to is empty; name a form such as lora$"):
        ExportStage(" ")
    with pytest.raises(RecipeError, match="^output is empty; name a folder, or leave it out$"):
        ExportStage("lora", "")
    for output in ("/", "..", "a/.."):
        with pytest.raises(RecipeError, match=f"^output '{output}' cannot be replaced as a whole"):
            ExportStage("lora", output)
    with pytest.raises(RecipeError, match="^repo 'a/b/c' is no name of a repository: "):
        PushStage("a/b/c")
    with pytest.raises(RecipeError, match="^revision is empty; name a branch, or leave it out$"):
        PushStage("a/b", revision="")


def test_auto_for_an_engine_takes_the_options_of_its_form() -> None:
    assert export_fault("mla", ExportStage("auto", engine="llama.cpp", kind="q8_0")) is None
    assert export_fault("mla", ExportStage("auto", engine="vllm", dtype="float32")) is None
    key, why = export_fault("mla", ExportStage("auto", engine="llama.cpp", dtype="float32")) or ("", "")
    assert (key, why) == ("dtype", "dtype does not apply to an export of mla to auto; leave it out")


COUNTS = st.none() | st.integers(1, 10**6)
WORDS = st.text("abc-./: #'\"é", min_size=1, max_size=8)
STAGES = {
    "eval": st.builds(
        EvalSettings,
        suite=st.sampled_from(declared(EvalSettings)["suite"].choices),
        tasks=st.lists(WORDS).map(tuple),
        text=st.lists(WORDS, min_size=1).map(tuple),  # sequences are of text
        limit=COUNTS,
        num_fewshot=COUNTS,
        retrieval=st.booleans(),
        sequences=st.integers(1, 99),
        dtype=st.sampled_from([None, "float32", "bfloat16"]),
        backend=st.sampled_from(declared(EvalSettings)["backend"].choices),
    ),
    "export": st.builds(
        ExportStage,
        to=st.sampled_from(["auto", "deepseek_v3"]),
        output=st.none() | WORDS.filter(lambda word: Path(word.strip()).name not in ("", "..")),
        dtype=st.sampled_from([None, "float32"]),
        pad_row=st.sampled_from([None, 320, 512, 576]),
        engine=st.sampled_from([None, "vllm", "llama.cpp"]),
    ).filter(lambda stage: export_fault("mla", stage) is None),
    "push": st.builds(PushStage, repo=st.sampled_from(["a/b", "name"]), private=st.booleans()),
}
HEALS = st.builds(
    HealSettings,
    tokens=st.integers(1, 10**10),
    lr=st.none() | st.floats(1e-9, 0.9),
    data=st.dictionaries(WORDS, st.floats(0.1, 10), min_size=1),
    warmup=st.floats(0, 0.99),
)


@given(
    budget=st.floats(1e-9, 1),
    heal=st.none() | HEALS,
    stages=st.fixed_dictionaries({name: st.none() | kind for name, kind in STAGES.items()}),
)
@settings(max_examples=60, deadline=None)
def test_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, budget: float, heal: HealSettings | None, stages: dict[str, Any]
) -> None:
    recipe = RunRecipe(Recipe("m", "mla", MLASettings(kv_budget=budget), heal=heal), **stages)
    path = tmp_path_factory.mktemp("trip") / "run.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert load(path) == recipe
    assert load_recipe(path) == recipe.convert


KEYS = st.sampled_from(["model", "method", "settings", "heal", "eval", "tokens", "kv_budget", "suite", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["mla", "moh", "1e-3", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(values=st.dictionaries(KEYS, VALUES), method=st.sampled_from(["mla", "moh", "dha", "hydra"]))
@settings(max_examples=200, deadline=None)
def test_nothing_but_a_recipe_or_a_fault(values: dict[str, Any], method: str) -> None:
    for data in (values, {"model": "m", "method": method} | values):
        try:
            recipe = RunRecipe.from_dict(data)
        except MhconvertError as error:
            said = str(error)
        else:
            said = recipe.summary()
        assert said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heal.lr=4e0", "--set heal.lr=4e0: heal.lr=4 is not between 0 and 1"),
        ("heal.warmup='4'", "--set heal.warmup='4': heal.warmup=4 is a share of the steps"),
        (
            "settings.kv_budget=1e400",
            "--set settings.kv_budget=1e400: settings.kv_budget: '1e400' is not a number",
        ),
        ("heal.clip=.inf", "--set heal.clip=.inf: heal.clip: inf is not a number"),
        ("heal.data=[1, a]", "--set heal.data=[1, a]: heal.data: 1 is not text"),
        ("heal.loss={kl: true}", "--set heal.loss={kl: true}: heal.loss: true is not a number"),
        ("heal.data={1: 2}", "--set heal.data={1: 2}: heal.data: 1 is not text"),
    ],
)
def test_values_that_other_types_hide(file: Path, override: str, expected: str) -> None:
    assert message(file, WHOLE, [override]).startswith(expected)


def test_faults_of_all_stages_are_told_together(file: Path) -> None:
    text = WHOLE.replace("3e-1", "3").replace("quick", "slow").replace("to: own", "too: own")
    text = text.replace("someone/model", "a/b/c").replace("tasks: piqa", "limit: 0")
    said = message(file, text)
    for part in (
        "run.yaml, line 5: settings.kv_budget=3 is outside (0, 1]; it is a share of the donor's KV cache; ",
        "; run.yaml, line 12: eval.suite: 'slow' is not one of quick, standard, transmla, moh, dha, open-llm, "
        "generation; ",
        "; run.yaml, line 13: eval.limit=0 is too small; use at least 1; ",
        f"; run.yaml, line 15: export has no key 'too'; did you mean to? (it has {EXPORT_KEYS}); ",
        "; run.yaml, line 14: export: the key 'to' is missing; ",
        "; run.yaml, line 17: push.repo 'a/b/c' is no name of a repository: ",
    ):
        assert part in f"; {said}; "
    said = message(file, text.replace("method: mla", "method: mqa"))
    assert said.startswith(
        "run.yaml, line 3: unknown method 'mqa'; choose one of mla, dha, moh, swa, mla+swa, hybrid, hydra; "
        "run.yaml, line 12:"
    )


@pytest.mark.parametrize(
    ("method", "to", "expected"),
    [
        (
            "dha",
            "gguf",
            "export.to 'gguf' holds what --to mla --profile portable makes; of dha choose one of llama,",
        ),
        (
            "hydra",
            "gguf",
            "export.to 'gguf' holds what --to mla --profile portable makes; of hydra choose one of lora,",
        ),
        ("moh", "auto", "export.to: a checkpoint of moh routes its heads, which no stock class does"),
    ],
)
def test_a_form_of_another_method_is_told_with_other_faults(
    file: Path, method: str, to: str, expected: str
) -> None:
    text = f"model: x\nmethod: {method}\ndtype: float64\nexport:\n  to: {to}\n"
    said = message(file, text)
    assert said.startswith("run.yaml, line 3: dtype 'float64' is not one of float32, bfloat16, float16; ")
    assert f"; run.yaml, line 5: {expected}" in said


@pytest.mark.parametrize("dtype", ["bf16", "torch.float16", "float32"])
def test_a_dtype_stays_as_written_so_that_a_finished_run_is_recognised(file: Path, dtype: str) -> None:
    file.write_text(f"model: x\nmethod: mla\ndtype: {dtype}\n", encoding="utf-8")
    assert load(file).to_dict()["dtype"] == dtype
    assert EvalSettings(suite="quick", dtype="bf16").dtype == "bfloat16"


@pytest.mark.parametrize("tolerance", ["kl=1", "ppl=1.10", "kl=5e-2"])
def test_a_tolerance_stays_as_written_so_that_a_finished_run_is_recognised(
    file: Path, tolerance: str
) -> None:
    file.write_text(f"model: x\nmethod: mla\ntolerance: {tolerance}\n", encoding="utf-8")
    assert load(file).to_dict()["tolerance"] == tolerance


@pytest.mark.parametrize(
    ("written", "data"),
    [
        ("[a=2]", {"a=2": 1.0}),
        ("a=2", {"a=2": 1.0}),
        ("[a.txt, self]", {"a.txt": 1.0, "self": 1.0}),
        ("{a: 2}", {"a": 2}),
    ],
)
def test_names_of_data_are_taken_as_they_are(file: Path, written: str, data: dict[str, float]) -> None:
    file.write_text(f"model: x\nmethod: mla\nheal: {{tokens: 5, data: {written}}}\n", encoding="utf-8")
    heal = load(file).convert.heal
    assert heal is not None
    assert heal.data == data


def test_tasks_may_be_one_text(file: Path) -> None:
    file.write_text("model: x\nmethod: mla\neval: {tasks: 'piqa, arc_*,'}\n", encoding="utf-8")
    assert load(file).to_dict()["eval"]["tasks"] == ["piqa", "arc_*"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("heal.tokens=1e-3", "heal.tokens '1e-3' is not a number of tokens such as 200k or 20M"),
        ("heal.tokens=1e400k", "heal.tokens=1e400k is not a whole number of tokens"),
        ("heal.tokens=-1", "heal.tokens=-1 is not a number of tokens such as 200k or 20M"),
        ("heal.save_tokens=-1", "heal.save_tokens=-1 is too small; use at least 1"),
        ("heal.batch_tokens=0", "heal.batch_tokens=0 is too small; use at least 1"),
        ("heal.eval_tokens=0k", "heal.eval_tokens=0 is too small; use at least 1"),
        ("dtype=float64", "dtype 'float64' is not one of float32, bfloat16, float16"),
        ("eval.dtype=float64", "eval.dtype 'float64' is not one of float32, bfloat16, float16"),
        ("max_shard_size=abc", "max_shard_size 'abc' is not a size such as 5GB or 500MB"),
        ("model=''", "model is empty; name a donor, such as smollm2-135m"),
        ("calibration.tokens=0", "calibration.tokens=0 does not fill a row; use at least 8"),
        ("calibration.sequence_length=0", "calibration.sequence_length=0 is too short; use at least 8"),
        ("calibration.tokens=-1", "calibration.tokens=-1 does not fill a row; use at least 8"),
        ("output=/", "output '/' cannot be replaced as a whole; name a folder of its own"),
        ("output=a/..", "output 'a/..' cannot be replaced as a whole; name a folder of its own"),
        ("output=''", "output is empty; name a folder, or leave it out"),
        (
            "export={to: own, output: /}",
            "export.output '/' cannot be replaced as a whole; name a folder of its own",
        ),
        (
            "device=evil",
            "device 'evil' cannot be used: it is none of torch's; choose one such as cpu or cuda:0",
        ),
        (
            "heal.device=evil",
            "heal.device 'evil' is neither cpu nor cuda; CUDA_VISIBLE_DEVICES chooses among GPUs",
        ),
        ("calibration.held_out=1", "calibration.held_out=1 rows measure nothing; use at least 2"),
        ("calibration.sources=[]", "calibration.sources is empty; name files, datasets, or self"),
        (
            "calibration.sources=[self, a, self]",
            "calibration.sources has self more than once; name it once",
        ),
        (
            "export.to=zzz",
            "export.to 'zzz' is no form of export; choose one of deepseek_v3, youtu, own, gguf, llama, "
            "nemotron-nas, lora, auto",
        ),
        (
            "export.to=lora",
            "export.to 'lora' holds an adapter of --to hydra; of mla choose one of deepseek_v3, youtu, own, gguf, "
            "auto",
        ),
        ("heal.tokens=true", "heal.tokens: true is not a whole number or text"),
        ("heal.data=['']", "heal.data has an empty name"),
        ("heal.data=", None),
        ("heal.data=''", "heal.data has an empty name"),
        ("heal.data={'': 1}", "heal.data has an empty name"),
        ("heal.loss=mse", "heal.loss has no term 'mse'; it has kl, ce, hidden, balance"),
        ("calibration.sources=['']", "calibration.sources has an empty name"),
        ("calibration.sources=!!set {a}", None),
        ("model=!!binary aGFsbG8=", None),
        ("eval.tasks=''", "eval.tasks '' has no name of a task"),
        ("eval.tasks=','", "eval.tasks ',' has no name of a task"),
        ("eval.text=''", "eval.text has an empty name"),
    ],
)
def test_values_that_were_taken_once(file: Path, override: str, expected: str | None) -> None:
    said = message(file, WHOLE, [override])
    if expected is not None:
        assert said == f"--set {override}: {expected}"
    elif "!!" in override:
        assert said.startswith(
            f"--set {override} cannot be read: could not determine a constructor for the tag"
        )
    else:
        assert said.startswith(f"--set {override} has no value")


def test_a_message_of_a_parser_names_its_key(file: Path) -> None:
    with pytest.raises(
        MhconvertError, match=r"^settings\.active: 'many' is neither a share of heads nor a list"
    ):
        RunRecipe.from_dict({"model": "x", "method": "moh", "settings": {"active": "many"}})
    text = "model: x\nmethod: moh\nsettings: {active: many}\n"
    assert message(file, text) == (
        "run.yaml, line 3: settings.active: 'many' is neither a share of heads nor a list such as 7,8,8,9"
    )


@pytest.mark.parametrize("value", ["!!binary aGFsbG8=", "!!set {a}"])
def test_yaml_that_no_setting_has(file: Path, value: str) -> None:
    said = message(file, WHOLE.replace("[self]", value))
    assert said.startswith("run.yaml, line 7 cannot be read: could not determine a constructor for the tag")


def test_faults_come_in_the_order_of_the_file(file: Path) -> None:
    text = WHOLE.replace("[self]", "[5]").replace("3e-1", "many").replace("20M", "lots")
    said = message(file, text)
    assert [said.index(f"line {line}:") for line in (5, 7, 9)] == sorted(
        said.index(f"line {line}:") for line in (5, 7, 9)
    )


def test_an_integer_stays_one_so_that_a_finished_run_is_recognised(file: Path) -> None:
    text = WHOLE.replace("3e-1", "1").replace("  lr: 1e-3", "  clip: 1\n  loss: {kl: 1, ce: 0.1}")
    file.write_text(text, encoding="utf-8")
    plain = load(file).to_dict()
    for value in (plain["settings"]["kv_budget"], plain["heal"]["clip"], plain["heal"]["loss"]["kl"]):
        assert type(value) is int
