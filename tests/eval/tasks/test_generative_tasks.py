"""Tasks that are answered in writing: one that knows the answers scores 1, another 0; and what is refused."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mhconvert import api
from mhconvert.convert.open_model import of_model, open_model
from mhconvert.errors import MhconvertError, TextError
from mhconvert.eval.page import page
from mhconvert.eval.report.task_notes import notes
from mhconvert.eval.result_cache import Store
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.tasks import generated_code, harness, requirements, ruler
from mhconvert.eval.tasks.candidate import Candidate
from mhconvert.eval.tasks.chat_template import answer_ends, asked_through
from mhconvert.eval.tasks.task_choice import resolve, suites
from tests.donors import make_donor, make_tokenizer

Answer = Callable[[str], str]  # of a prompt
SUM = 'def add(a, b):\n    """The sum."""\n'
LONG = {
    "qasper": "rainfall",
    "hotpotqa": "Arden",
    "gov_report": "Rain fell.",
    "passage_retrieval_en": "Paragraph 2",
}


def write_lines(file: Path, *rows: dict[str, Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    sums = [{"question": f"Twenty hens and {more} more?", "answer": f"#### {20 + more}"} for more in (3, 7)]
    write_lines(folder / "gsm8k_test.jsonl", *sums)
    follow = {
        "key": 1,
        "prompt": "Name a river.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    write_lines(folder / "input_data.jsonl", follow)
    problem = {"prompt": SUM, "entry_point": "add", "test": "def check(f):\n    assert f(1, 2) == 3\n"}
    write_lines(folder / "HumanEval.jsonl", problem)
    for name, answer in LONG.items():
        line = {"context": f"Paragraph 1: Rain, on {name}.", "input": "What is asked?", "answers": [answer]}
        write_lines(folder / f"{name}.jsonl", line)
    return folder


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-ins of the packages that lm-eval's tasks import, as far as these documents need them."""
    parts: dict[str, dict[str, Any]] = {
        "langdetect": {"detect": lambda _: "en", "LangDetectException": ValueError},
        "immutabledict": {"immutabledict": dict},
        "jieba": {},
        "fuzzywuzzy": {"fuzz": None},
        "rouge": {"Rouge": lambda: SimpleNamespace(get_scores=_same)},
        "wonderwords": {"RandomWord": lambda: SimpleNamespace(_categories=WORDS)},
    }
    ours = ("lm_eval.tasks.ifeval", "lm_eval.tasks.ruler", "lm_eval.tasks.longbench")

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith(ours)]:
            del sys.modules[name]

    forget()
    for name, contents in parts.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    forget()


WORDS = {"nouns": [f"hen{number}" for number in range(999)], "adjectives": ["red"], "verbs": ["run"]}


def _same(texts: list[str], wanted: list[str], **_: Any) -> dict[str, dict[str, float]]:
    return {"rouge-l": {"f": float(texts == wanted)}}


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("written") / "knows"
    return make_donor(place, layers=1, kv_heads=2, hidden=32, max_position_embeddings=8192)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("written") / "guesses"
    return make_donor(place, layers=1, kv_heads=2, hidden=32, max_position_embeddings=8192, seed=1)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Answer]], list[Any]]:
    """Lets a model, by its name, write an answer, its end, and then something else; what `generate` was given."""
    load, heard = Candidate.load, []

    def speaking(answers: dict[str, Answer]) -> list[Any]:
        def loaded(self: Candidate, dtype: torch.dtype = torch.float32) -> Any:
            model, tokenizer = load(self, dtype), self.opened.tokenizer()

            def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
                heard.append(options)
                prompts = tokenizer.batch_decode(input_ids)
                rows = [
                    tokenizer(answers[self.name](prompt) + "<|eos|> 999 wrong").input_ids
                    for prompt in prompts
                ]
                longest = max(map(len, rows))
                padded = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
                return torch.cat([input_ids, padded], 1)

            model.generate = generate
            return model

        monkeypatch.setattr(Candidate, "load", loaded)
        return heard

    return speaking


def candidate(folder: Path, **options: Any) -> Candidate:
    opened = open_model(str(folder), device="cpu")
    return Candidate(opened, of_model(opened), EvalSettings(**({"suite": "generation"} | options)))


def evaluate(each: Candidate, place: Path, store: Store, **more: Any) -> Any:
    place.mkdir(exist_ok=True)
    return harness.evaluate(each, resolve(each.settings, place), store, **more)


def gold(touched: Path) -> Answer:
    """What a model that knows the answers writes; its code would leave a file where it were run."""

    def answer(prompt: str) -> str:
        asked = prompt.rpartition("<|bos|>user")[2]
        if "hens" in asked:
            return f"The answer is {23 if 'and 3' in asked else 27}.\n\nQ: more"
        if "Name a river" in asked:
            return "The Nile runs north."
        if "def add" in asked:
            return f"    open({str(touched)!r}, 'w')\n    return a + b\n```\nThat is (it"
        if "special magic number" in asked:
            word = asked.rpartition("number for ")[2].partition(" mentioned")[0]
            return asked.partition(f"for {word} is: ")[2].partition(".")[0]
        if "coded text" in asked:
            words = [
                word for word in asked.partition("coded words. ")[2].split("\n")[0].split() if word != "..."
            ]
            return " ".join(sorted(set(words), key=lambda word: -words.count(word))[:3])
        return next(text for name, text in LONG.items() if f"on {name}." in asked)

    return answer


def test_a_model_that_knows_the_answers_scores_one(
    donor: Path,
    twin: Path,
    copies: Path,
    tmp_path: Path,
    packages: None,
    say: Callable[[dict[str, Answer]], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through lm-eval's prompts, stop strings, filters and metrics; texts end at the first end token."""
    heard = say({"knows": gold(tmp_path / "run"), "guesses": lambda _: "42, nothing, (never"})
    from lm_eval.tasks.ruler import common_utils

    monkeypatch.setattr(
        common_utils, "get_tokenizer", lambda *_: pytest.fail("would run a tokenizer's own code")
    )
    settings = EvalSettings(suite="generation", data=str(copies), limit=2)
    result = api.evaluate(str(twin), settings, against=str(donor), device="cpu")
    primary = {
        row["task"]: next(metric["models"] for metric in row["metrics"] if metric["primary"])
        for row in result["tasks"]
    }
    assert list(primary) == suites()["generation"]["tasks"]
    assert {name: [model["value"] for model in models] for name, models in primary.items()} == {
        name: [1.0, 0.0] for name in primary
    }
    assert (primary["gsm8k_cot"][1]["difference"], primary["gsm8k_cot"][1]["difference_stderr"]) == (
        -1.0,
        0.0,
    )
    assert result["average"] is None
    (mean,) = result["apart"]
    assert (mean["name"], len(mean["tasks"])) == (
        "generative tasks",
        9,
    )  # all but humaneval, which is not run
    assert [model["value"] for model in mean["models"]] == [1.0, 0.0]
    assert not (tmp_path / "run").exists()
    assert result["settings"]["chat_template"] is True
    assert {str(options["eos_token_id"]) for options in heard} == {"[1]"}
    assert not any("cut_prompts" in row for row in result["tasks"])
    report = tmp_path / "report.md"
    page.write(report, result, *page.sources(result))
    text = report.read_text(encoding="utf-8").replace("\\", "")
    for words in (*notes(result), "generative tasks", "of 9 tasks", "from gsm8k_test.jsonl", "8-shot"):
        assert words in text
    assert [note.partition(" ")[0] for note in notes(result)] == ["Tasks", "humaneval_instruct:"]


def continued(each: Candidate, *prompts: str, **options: Any) -> list[str]:
    from lm_eval.api.instance import Instance

    requests = [Instance("generate_until", {}, (prompt, {"until": []} | options), 0) for prompt in prompts]
    lm = harness.language_model(each)
    lm.batch_size_per_gpu = 2
    return lm.generate_until(requests)  # type: ignore[no-any-return]


def test_texts_are_those_of_lm_eval_itself(data: Path) -> None:
    """Of a model with no ends beside its own, and with stop strings, which are cut off."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = data / "checkpoints" / "stories260k-gqa"
    prompts = ("Once upon a time", "Tom had a ball.", "One day, a big dog")
    plain = HFLM(pretrained=str(folder), dtype="float32", batch_size=2, device="cpu")
    options = {"until": ["."], "max_gen_toks": 24}
    requests = [Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts]
    each, rows = candidate(folder), []
    harness.language_model(each).on_rows = lambda done, total: rows.append((done, total))
    texts = continued(each, *prompts, **options)
    assert texts == plain.generate_until(requests, disable_tqdm=True)
    assert rows == [(2, 3), (3, 3)]
    whole = continued(each, *prompts, max_gen_toks=24)
    assert texts == [text.partition(".")[0] for text in whole]
    assert texts != whole


def test_an_end_token_ends_a_text(data: Path) -> None:
    """Also of the row of a batch that ends first."""
    each = candidate(data / "checkpoints" / "stories260k-gqa")
    asked = ("Once upon a time", "Tom had a ball.")
    free = continued(each, *asked, max_gen_toks=12)
    comma = each.lm.tok_encode(",")[-1]
    assert ["," in text for text in free] == [True, False]
    each.lm._ends = [comma]
    assert continued(each, *asked, max_gen_toks=12) == [free[0].partition(",")[0], free[1]]


def test_what_ends_an_answer_is_read_off_the_template() -> None:
    tokenizer = make_tokenizer()
    assert answer_ends(tokenizer) == [1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} <|im_end|><|eos|>{% endfor %}"
    assert answer_ends(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    for template in ("{{ messages[-1]['content'] }}\n", "{{ raise_exception('no') }}"):
        tokenizer.chat_template = template
        assert answer_ends(tokenizer) == []


def test_a_long_prompt_lacks_its_middle(donor: Path) -> None:
    lm = harness.language_model(candidate(donor))
    long, short = "the river ran slowly past the town and into the sea", "boats came home"
    ids, mask = lm.tok_batch_encode([long, short], left_truncate_len=9)
    whole, part = lm.tok_encode(long), lm.tok_encode(short)
    assert ids[0].tolist() == whole[:4] + whole[-5:]
    assert ids[1, mask[1].bool()].tolist() == part
    assert (len(part), ids.shape) == (int(mask[1].sum()), (2, 9))
    ids, _ = lm.tok_batch_encode([long, short], left_truncate_len=99)
    assert ids.shape[1] == len(whole)


def test_prompts_that_were_cut_are_counted_and_new_tokens_have_to_fit(
    donor: Path, copies: Path, tmp_path: Path, say: Callable[[dict[str, Answer]], list[Any]]
) -> None:
    say({"knows": gold(tmp_path / "run")})
    asked = {"suite": None, "tasks": ("gsm8k_cot", "humaneval"), "data": str(copies)}
    each = candidate(donor, max_length=1100, **asked)
    sums, code = evaluate(each, tmp_path / "tasks", Store(tmp_path / "store"))
    assert (sums["cut_prompts"], code["cut_prompts"]) == (2, 0)
    result = {"tasks": [{"task": "gsm8k_cot", "samples": 2, "cut_prompts": [0, 2], "metrics": []}]}
    result |= {"models": [{"name": "a"}, {"name": "b"}], "settings": {"chat_template": False}}
    assert notes(result) == ["gsm8k_cot: 2 of 2 prompts are longer than b reads, and lack their middle."]
    with pytest.raises(
        MhconvertError, match="task humaneval asks for more new tokens than knows reads.*leave the task"
    ):
        evaluate(candidate(donor, max_length=1024, **asked), tmp_path / "tasks", Store(tmp_path / "store"))


def test_an_interrupted_task_goes_on(
    donor: Path, copies: Path, tmp_path: Path, say: Callable[[dict[str, Answer]], list[Any]]
) -> None:
    heard = say({"knows": gold(tmp_path / "run")})
    asked: dict[str, Any] = {"suite": None, "tasks": ("gsm8k_cot",), "data": str(copies), "batch_size": 1}
    store = Store(tmp_path / "store")

    def stop(_: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(candidate(donor, **asked), tmp_path / "tasks", store, on_rows=stop)
    assert len(heard) == 2
    (outcome,) = evaluate(candidate(donor, **asked), tmp_path / "tasks", store)
    assert len(heard) == 3
    assert outcome["results"]["gsm8k_cot"]["exact_match,strict-match"] == 1.0
    evaluate(candidate(donor, **asked), tmp_path / "tasks", store)
    assert len(heard) == 3


def test_missing_packages_are_named_before_a_model_is_opened(
    copies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name in ("jieba", "langdetect") else name
    )
    settings = EvalSettings(suite="generation", data=str(copies))
    message = (
        r"ifeval, longbench_qasper, .* need langdetect, jieba: pip install 'lm_eval\[ifeval,longbench\]', or"
    )
    with pytest.raises(MhconvertError, match=message):
        api.evaluate(str(tmp_path / "no model at all"), settings, against=None, device="cpu")


def test_sentences_need_nltks_data(
    copies: Path, tmp_path: Path, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvalSettings(tasks=("ifeval",), data=str(copies))

    def absent(name: str) -> None:
        raise LookupError(name)

    asked: list[str] = []
    monkeypatch.setattr("nltk.data.find", absent)
    monkeypatch.setattr("nltk.download", lambda name, **_: asked.append(name))
    (tmp_path / "tasks").mkdir()
    resolve(settings, tmp_path / "tasks")
    assert asked == []
    line = json.loads((copies / "input_data.jsonl").read_text())
    write_lines(
        copies / "input_data.jsonl", line | {"instruction_id_list": ["length_constraints:number_sentences"]}
    )
    with pytest.raises(
        MhconvertError, match="ifeval split sentences with nltk's data punkt_tab.*nltk.downloader"
    ):
        resolve(settings, tmp_path / "tasks")
    assert asked == ["punkt_tab"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("    return a + b\n```\nwhich is (it", 1.0),
        ("    return (a + b\n", 0.0),
        ("", 0.0),  # a function with nothing but its docstring
        ("\0", 0.0),
    ],
)
def test_code_parses(written: str, value: float) -> None:
    assert generated_code.parses({"prompt": SUM, "entry_point": "add"}, [written]) == {"parses": value}
    assert generated_code.parses({"prompt": SUM, "entry_point": "other"}, [written]) == {"parses": 0.0}


def test_code_runs_only_where_that_is_allowed(
    donor: Path, copies: Path, tmp_path: Path, say: Callable[[dict[str, Answer]], list[Any]], monkeypatch: Any
) -> None:
    import evaluate as metrics

    def compute(references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        return {f"pass@{k[0]}": float("return a + b" in predictions[0][0])}, {}

    def absent(_: str) -> Any:
        raise FileNotFoundError("no Hub")

    (tmp_path / "tasks").mkdir()
    for name in ("mbpp", "cruxeval_output"):
        with pytest.raises(
            MhconvertError, match=f"{name} runs the code that a model writes.*--run-generated-code allows"
        ):
            resolve(EvalSettings(tasks=(name,)), tmp_path / "tasks")
    for marked, allowed in ((False, False), (True, True)):
        requirements.refuse_code(
            "group_of_mine", EvalSettings(tasks="a", run_generated_code=allowed), marked=marked
        )
    with pytest.raises(MhconvertError, match="group_of_mine runs the code"):
        requirements.refuse_code("group_of_mine", EvalSettings(tasks="a"), marked=True)
    globbed = EvalSettings(tasks="humaneva?", data=str(copies))
    (spec,) = resolve(globbed, tmp_path / "tasks").specs
    assert (spec.name, spec.local) == ("humaneval", copies / "HumanEval.jsonl")
    asked: dict[str, Any] = {"suite": None, "tasks": ("humaneval_instruct",), "data": str(copies)}
    asked["run_generated_code"] = True
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    monkeypatch.setattr(metrics, "load", absent)
    with pytest.raises(MhconvertError, match="needs the metric code_eval of evaluate.*no Hub; leave out"):
        resolve(EvalSettings(**asked), tmp_path / "tasks")
    monkeypatch.setattr(metrics, "load", lambda _: SimpleNamespace(compute=compute))
    say({"knows": gold(tmp_path / "run")})
    (outcome,) = evaluate(candidate(donor, **asked), tmp_path / "tasks", Store(tmp_path / "store"))
    assert outcome["results"]["humaneval_instruct"]["pass@1,create_test"] == 1.0
    sys.modules.pop("lm_eval.tasks.humaneval.utils", None)  # it has the stand-in


def test_the_suite_asks_through_the_donors_template_unless_told_otherwise(
    donor: Path, tmp_path: Path
) -> None:
    mute = make_donor(tmp_path / "mute", layers=1)
    (mute / "chat_template.jinja").unlink()
    chat, plain = open_model(str(donor), device="cpu"), open_model(str(mute), device="cpu")
    generation = EvalSettings(suite="generation")
    assert (asked_through(generation, chat), asked_through(generation, plain)) == (True, False)
    assert asked_through(EvalSettings(suite="quick"), chat) is False
    assert asked_through(EvalSettings(suite="generation", chat_template=False), chat) is False
    assert asked_through(EvalSettings(suite="quick", chat_template=True), plain) is True
    with pytest.raises(MhconvertError, match="mute has no chat template; give --no-chat-template"):
        harness.language_model(candidate(mute, chat_template=True))


def test_a_question_that_the_template_refuses(donor: Path, copies: Path, tmp_path: Path) -> None:
    each = candidate(donor, suite=None, tasks=("gsm8k_cot",), data=str(copies), chat_template=True)
    harness.language_model(each).tokenizer.chat_template = "{{ raise_exception('one turn\nonly') }}"
    with pytest.raises(
        MhconvertError, match="the chat template refuses a question of the task: one turn only; ask"
    ):
        evaluate(each, tmp_path / "tasks", Store(tmp_path / "store"))


def test_texts_of_ruler_are_the_same_at_every_call_and_fit(donor: Path, tmp_path: Path) -> None:
    settings = EvalSettings(tasks=("ruler_fwe",), limit=3, max_length=700, chat_template=True)
    opened = [open_model(str(donor), device="cpu")]
    found, state = [], random.getstate()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (spec,) = ruler.written(resolve(settings, tmp_path / name), opened, settings).specs
        assert spec.local is not None
        found.append((spec.digest, spec.local.read_text(encoding="utf-8")))
    assert found[0] == found[1]
    assert random.getstate() == state
    documents = [json.loads(line) for line in found[0][1].splitlines()]
    assert len({document["input"] for document in documents}) == 3
    tokenizer = opened[0].tokenizer()
    lengths = [len(tokenizer(document["input"] + document["gen_prefix"]).input_ids) for document in documents]
    assert 500 < min(lengths) <= max(lengths) <= 650
    with pytest.raises(MhconvertError, match="ruler_fwe has no text for rows of 200 tokens; give a larger"):
        ruler.written(
            resolve(settings, tmp_path / "one"), opened, EvalSettings(tasks=("ruler_fwe",), max_length=200)
        )
    with pytest.raises(
        MhconvertError, match="ruler_vt is not run: its maker of texts does not end.*niah_single_1"
    ):
        resolve(EvalSettings(tasks=("ruler_vt",)), tmp_path / "one")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "gsm8k_test.jsonl of task gsm8k_cot has no documents"),
        (b"\x80\xff\x00", "gsm8k_test.jsonl of task gsm8k_cot cannot be read as JSON lines"),
        (
            b'{"question": "?"}\n',
            r"is no copy of gsm8k_cot: line 1 has \['question'\] instead of question, answer",
        ),
    ],
)
def test_files_that_are_no_copies(copies: Path, tmp_path: Path, contents: bytes, message: str) -> None:
    (copies / "gsm8k_test.jsonl").write_bytes(contents)
    with pytest.raises(TextError, match=message):
        resolve(EvalSettings(tasks=("gsm8k_cot",), data=str(copies)), tmp_path)
    (copies / "gsm8k_test.jsonl").unlink()
    with pytest.raises(
        TextError, match=r"no file for gsm8k_cot \(.*; add them, or name the tasks that it has"
    ):
        resolve(EvalSettings(tasks=("gsm8k_cot",), data=str(copies)), tmp_path)
