"""lm-eval on our models: the figures that lm-eval gives by itself, once; kept, resumed, and asked for in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from mhconvert import api
from mhconvert.convert.open_model import of_model, open_model
from mhconvert.errors import MhconvertError, OutputError, TextError
from mhconvert.eval import result_cache
from mhconvert.eval.page import page
from mhconvert.eval.result_cache import Store
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.tasks import harness
from mhconvert.eval.tasks.candidate import CPU_BATCH, Candidate
from mhconvert.eval.tasks.progress_model import prefix_token
from mhconvert.eval.tasks.task_choice import resolve
from mhconvert.library_versions import versions
from tests.donors import make_donor, make_tokenizer

QUICK = EvalSettings(suite="quick")


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("harness") / "tiny", layers=2, kv_heads=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_donor(tmp_path_factory.mktemp("harness") / "twin", layers=2, kv_heads=2, seed=1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def candidate(folder: Path, **options: Any) -> Candidate:
    opened = open_model(str(folder), device="cpu")
    return Candidate(opened, of_model(opened), EvalSettings(suite="quick", **options))


def evaluate(each: Candidate, store: Store, place: Path, choice: EvalSettings = QUICK, **more: Any) -> Any:
    place.mkdir(exist_ok=True)
    return harness.evaluate(each, resolve(choice, place), store, **more)


def test_figures_are_those_of_lm_eval_itself(donor: Path, store: Store, tmp_path: Path) -> None:
    """The folder given to lm-eval by its path, as its own command line does."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (ours,) = evaluate(candidate(donor), store, tmp_path / "tasks")
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(donor), "dtype": "float32"},
        tasks=["mhconvert_quick"],
        batch_size=CPU_BATCH,
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )
    expected = theirs["results"]["mhconvert_quick"]
    assert ours["results"]["mhconvert_quick"] == expected
    samples = sorted(theirs["samples"]["mhconvert_quick"], key=lambda sample: sample["doc_id"])
    assert ours["samples"]["mhconvert_quick"]["acc,none"] == [sample["acc"] for sample in samples]
    assert 0 < expected["acc,none"] < 1  # a model that always or never was right would prove nothing


def test_a_token_before_a_text(donor: Path, tmp_path: Path) -> None:
    """The begin or end of text, by tokenizer or config, as lm-eval has it; else a line break, or words."""
    config, tokenizer = LlamaConfig(vocab_size=320, bos_token_id=7, eos_token_id=[8, 9]), make_tokenizer()
    assert prefix_token(tokenizer, config) == 0
    tokenizer.bos_token = None
    assert prefix_token(tokenizer, config) == 1
    tokenizer.eos_token = None
    assert prefix_token(tokenizer, config) == 7
    config.bos_token_id = 320  # has no row in the embedding
    assert prefix_token(tokenizer, config) == 8
    config.eos_token_id = None
    (line_break,) = tokenizer("\n")["input_ids"]
    assert prefix_token(tokenizer, config) == line_break
    config.vocab_size = line_break
    with pytest.raises(MhconvertError, match="neither bos nor eos nor a line break"):
        prefix_token(tokenizer, config)


def test_a_tokenizer_without_special_tokens(tmp_path: Path, store: Store) -> None:
    """Questions are padded and end, though nothing names a token for it, and a new one would have no row."""
    from lm_eval.api.instance import Instance

    folder = make_donor(tmp_path / "plain", layers=1, bos_token_id=None, eos_token_id=None)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<t{number}>" for number in range(320)])
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, None)
    tokenizer.save_pretrained(folder)
    each = candidate(folder, limit=2)
    (quick,) = evaluate(each, store, tmp_path / "tasks")
    assert len(quick["samples"]["mhconvert_quick"]["acc,none"]) == 2

    def continued(*questions: str) -> list[str]:
        options = {"until": ["never"], "max_gen_toks": 3}
        requests = [Instance("generate_until", {}, (question, options), 0) for question in questions]
        return each.lm.generate_until(requests, disable_tqdm=True)  # type: ignore[no-any-return]

    together = continued("a", "a much longer question")
    assert together == [continued("a")[0], continued("a much longer question")[0]]
    assert all(together)
    with pytest.raises(TextError, match=r"\('<t319>'\), and the model's embedding has 320 rows"):
        continued("<t319>")


def test_a_stored_result_needs_no_model(
    donor: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(candidate(donor, limit=6), store, tmp_path / "tasks")
    monkeypatch.setattr(harness, "language_model", lambda _: pytest.fail("the model was asked again"))
    assert evaluate(candidate(donor, limit=6), store, tmp_path / "tasks") == first
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        evaluate(candidate(donor, limit=7), store, tmp_path / "tasks")
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        evaluate(candidate(donor, limit=6), store, tmp_path / "tasks", fresh=True)


def test_another_library_is_another_result(
    donor: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = candidate(donor).key()
    store.save(key, "stored")
    assert store.load(key) == "stored"
    for name in ("mhconvert", "torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(result_cache, "versions", lambda name=name: versions() | {name: "another"})
            assert store.load(key) is None
    monkeypatch.setattr("importlib.metadata.version", lambda _: "another")  # of lm-eval
    assert store.load(key) is None


@pytest.mark.parametrize("choice", [QUICK, EvalSettings(text="text.txt", sequences=1, sequence_length=16)])
def test_logits_that_are_no_numbers_have_no_accuracy(tmp_path: Path, choice: EvalSettings) -> None:
    """Weights that are finite, and overflow on the way."""
    place = make_donor(tmp_path / "loud", layers=2, kv_heads=2)
    weights = load_file(place / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].sign() * 3e38
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    (tmp_path / "text.txt").write_text("The river ran slowly past the town. " * 20)
    if choice.text:
        choice = dataclasses.replace(choice, text=str(tmp_path / "text.txt"))
    with pytest.raises(MhconvertError, match="loud gives logits that are NaN in float32"):
        api.evaluate(str(place), choice, against=str(place), device="cpu")


def test_another_weight_is_another_model(donor: Path, other: Path, store: Store, tmp_path: Path) -> None:
    assert candidate(donor).fingerprint != candidate(other).fingerprint
    assert candidate(donor).fingerprint == candidate(donor).fingerprint
    samples = [evaluate(candidate(each), store, tmp_path / "tasks")[0]["samples"] for each in (donor, other)]
    assert samples[0] != samples[1]


def test_a_report_in_the_folder_is_no_part_of_the_model(donor: Path) -> None:
    before = candidate(donor).fingerprint
    (donor / "evaluation.json").write_text("{}")
    assert candidate(donor).fingerprint == before
    (donor / "evaluation.json").unlink()


def test_an_interrupted_task_goes_on_where_it_was(
    donor: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle: what was answered is not asked again, and the result is that of an uninterrupted run."""
    whole = evaluate(candidate(donor), Store(tmp_path / "other"), tmp_path / "tasks")[0]["results"]
    rows: list[int] = []

    def stop(_: str, done: int, total: int) -> None:
        rows.append(total)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(candidate(donor), store, tmp_path / "tasks", on_rows=stop)
    asked = max(rows)
    rows.clear()
    resumed = evaluate(
        candidate(donor), store, tmp_path / "tasks", on_rows=lambda _, done, total: rows.append(total)
    )
    assert resumed[0]["results"] == whole
    assert 0 < max(rows) <= 0.6 * asked


def test_progress_of_rolling_windows_is_counted_beforehand(donor: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(
        " = One = \n \n" + "Some words here . " * 200 + "\n = Two = \n more \n"
    )
    progress: list[tuple[int, int]] = []
    choice = EvalSettings(tasks=("wikitext",), data=str(tmp_path))
    each = candidate(donor, max_length=64)
    (outcome,) = evaluate(
        each, store, tmp_path / "tasks", choice, on_rows=lambda _, done, total: progress.append((done, total))
    )
    assert outcome["counts"] == {"wikitext": 2}
    assert {total for _, total in progress} == {len(progress)}
    assert [done for done, _ in progress] == list(range(1, len(progress) + 1))
    assert len(progress) > 10


def test_batch_and_dtype(donor: Path) -> None:
    assert candidate(donor).batch_size(rolling=False) == 8
    assert candidate(donor).batch_size(rolling=True) == 1
    assert candidate(donor, batch_size=3).batch_size(rolling=True) == 3
    assert candidate(donor).dtype == torch.float32
    assert candidate(donor, dtype="bfloat16").dtype == torch.bfloat16
    cuda = candidate(donor)
    cuda.opened.device = "cuda"
    assert cuda.batch_size(rolling=True) == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "vllm"}, "--backend vllm needs vllm, which is not installed here"),
        (
            {"backend": "vllm", "kv_cache_dtype": "int4"},
            "vllm has no KV cache of dtype int4; choose --kv-cache-dtype",
        ),
        ({"kv_cache_dtype": "int5"}, "'int5' is not one of auto, int8, int4, int3, int2, fp8"),
        ({"backend": "jax"}, "'jax' is not one of hf, vllm"),
        ({"limit": 0}, "limit=0 is too small"),
        ({"dtype": "float99"}, "dtype 'float99' is not one of float32, bfloat16, float16"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MhconvertError, match=message):
        harness.require_available(EvalSettings(suite="quick", **options))


def test_the_chat_template_changes_the_questions_and_is_part_of_the_key(
    donor: Path, store: Store, tmp_path: Path
) -> None:
    plain, asked = (
        evaluate(candidate(donor, chat_template=flag), store, tmp_path / "tasks")[0]["samples"]
        for flag in (False, True)
    )
    assert plain != asked
    mute = make_donor(tmp_path / "mute", layers=2, kv_heads=2)
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(MhconvertError, match="has no chat template; give --no-chat-template"):
        evaluate(candidate(mute, chat_template=True), store, tmp_path / "tasks")


def test_documents_that_cannot_be_had_name_the_way_out(donor: Path, store: Store, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "absent.yaml").write_text(
        "task: absent\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/at/all.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: 0\ndoc_to_choice: c\n"
    )
    choice = EvalSettings(tasks=("absent",), include_path=str(own))
    with pytest.raises(
        TextError, match=r"the documents of task absent cannot be had: .*nowhere/at/all.*--data"
    ):
        evaluate(candidate(donor), store, tmp_path / "tasks", choice)


def test_a_store_that_cannot_be_written_is_said(donor: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="which keeps results, cannot be written.*MHCONVERT_EVAL_CACHE"):
        evaluate(candidate(donor, limit=2), Store(tmp_path / "file" / "store"), tmp_path / "tasks")


def test_a_damaged_database_is_removed_and_said(donor: Path, store: Store, tmp_path: Path) -> None:
    each = candidate(donor, limit=2)
    database = Path(store.responses(harness.responses_key(each)) + "_rank0.db")
    database.write_bytes(b"no database at all " * 400)
    with pytest.raises(OutputError, match=r"were damaged \(.*\) and are removed; run the same command again"):
        evaluate(each, store, tmp_path / "tasks")
    assert not database.exists()
    assert evaluate(candidate(donor, limit=2), store, tmp_path / "tasks")[0]["counts"] == {
        "mhconvert_quick": 2
    }


def test_the_comparison_pairs_donor_and_other(donor: Path, other: Path) -> None:
    settings = EvalSettings(suite="quick", limit=20)
    result = api.evaluate(str(other), settings, against=str(donor), device="cpu")
    assert [model["name"] for model in result["models"]] == ["tiny", "twin"]
    (row,) = result["tasks"]
    donors, others = row["metrics"][0]["models"]
    assert others["difference"] == pytest.approx(others["value"] - donors["value"])
    assert others["difference_stderr"] > 0
    assert (row["samples"], row["num_fewshot"], row["local"]) == (20, 0, "items.jsonl")
    assert result["versions"]["lm_eval"]
    with pytest.raises(MhconvertError, match="there is nothing to evaluate"):
        EvalSettings()


def test_reports_stand_beside_their_own_models(donor: Path, other: Path, tmp_path: Path) -> None:
    (other / "report.json").write_text('{"seconds": 1}')
    models = [
        {"role": role, "reference": str(place)} for role, place in (("donor", donor), ("donor", tmp_path))
    ]
    models.append({"role": "converted", "reference": str(other)})
    assert page.sources({"models": models})[0] == [{}, {"seconds": 1}]
    (other / "report.json").unlink()


def test_figures_are_recorded_in_the_checkpoint_but_not_in_the_donor(
    donor: Path, other: Path, tmp_path: Path
) -> None:
    converted = tmp_path / "converted"
    converted.mkdir()
    for file in other.iterdir():
        (converted / file.name).write_bytes(file.read_bytes())
    (converted / "mhconvert.json").write_text(json.dumps({"recipe": {"model": str(donor), "method": "dha"}}))
    result = api.evaluate(str(converted), EvalSettings(suite="quick", limit=4), record=True, device="cpu")
    assert json.loads((converted / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert [(model["role"], model["method"]) for model in result["models"]] == [
        ("donor", None),
        ("converted", "dha"),
    ]
    assert not (donor / "evaluation.json").exists()
    (tmp_path / "text.txt").write_text("The river ran slowly past the town. " * 20)
    on_text = EvalSettings(text=str(tmp_path / "text.txt"), limit=4, sequences=1, sequence_length=16)
    added = api.evaluate(str(converted), on_text, record=True, device="cpu")
    kept = json.loads((converted / "evaluation.json").read_text())
    assert kept["tasks"] == json.loads(json.dumps(result["tasks"]))
    assert kept["texts"] == json.loads(json.dumps(added["texts"]))
    assert kept["versions"]["lm_eval"]
    for older in ({"models": [1]}, kept | {"models": [{"fingerprint": "of a version that said no more"}]}):
        (converted / "evaluation.json").write_text(json.dumps(older))
        again = api.evaluate(str(converted), on_text, record=True, device="cpu")
        again.pop("kept_aside", None)
        assert json.loads((converted / "evaluation.json").read_text()) == json.loads(json.dumps(again))
    other_limit = dataclasses.replace(on_text, limit=5)
    api.evaluate(str(converted), other_limit, record=True, device="cpu")
    assert json.loads((converted / "evaluation.json").read_text())["tasks"] == []  # not of the same documents
