"""Our prompts, the user's, and those that a file or a model does not take."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mhconvert import api
from mhconvert.convert.open_model import open_model
from mhconvert.errors import MhconvertError, TextError
from mhconvert.eval.settings import EvalSettings
from mhconvert.eval.writing.prompts import Asked, Prompt, asked, prompt_rows, read
from tests.donors import make_donor

RIVER = Asked([Prompt("The river")], "own", 8)


def test_our_own_are_of_several_kinds_and_languages() -> None:
    prompts = read(None)
    assert len({prompt.text for prompt in prompts}) == 40
    kinds = {"question", "explanation", "story", "list", "json", "code", "summary", "dialogue", "translation"}
    assert {prompt.kind for prompt in prompts} == kinds
    assert {"en", "de", "fr", "es", "it", "pt", "zh"} == {prompt.language for prompt in prompts}
    assert {(p.kind, p.format) for p in prompts if p.format} == {("json", "json"), ("code", "python")}


def test_a_file_of_lines_and_one_of_json(tmp_path: Path) -> None:
    lines, records = tmp_path / "lines.txt", tmp_path / "records.jsonl"
    lines.write_text("One\n\n  Two \n", encoding="utf-8")
    records.write_text(
        '{"prompt": "One"}\n{"prompt": "Two", "format": "json", "kind": "k"}\n', encoding="utf-8"
    )
    assert read(lines) == [Prompt("One"), Prompt("Two")]
    assert read(records) == [Prompt("One"), Prompt("Two", "k", "", "json")]


def test_the_standard_suite_asks_the_first_of_them() -> None:
    of_suite = asked(EvalSettings(suite="standard"))
    assert of_suite is not None
    assert of_suite.prompts == read(None)[: len(of_suite.prompts)]
    assert {prompt.format for prompt in of_suite.prompts} == {None, "json", "python"}
    assert asked(EvalSettings(suite="standard", generation=True)) == Asked(read(None), "own", 256)
    assert asked(EvalSettings(suite="quick")) is None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "has no prompts; write one a line, or JSON lines with 'prompt'"),
        ("blank.txt", b" \n\n", "has no prompts"),
        ("zero.txt", b"a\0b", "it is not text: it has zero bytes"),
        ("binary.jsonl", bytes(range(128, 256)), "it is not UTF-8 text"),
        ("page.txt", b"%PDF-1.7", "it is a PDF"),
        ("text.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2: it has no text in 'prompt'"),
        ("number.jsonl", b'{"prompt": 7}\n', "line 1: it has no text in 'prompt'"),
        ("broken.jsonl", b'{"prompt": "a"\n', "line 1: it has no text in 'prompt'"),
        ("form.jsonl", b'{"prompt": "a", "format": "xml"}\n', "format 'xml' is none of json, python"),
        ("half.jsonl", b'{"prompt": "a \\ud800"}\n', "its prompt cannot be used: character 3 is"),
    ],
)
def test_files_that_are_no_prompts(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=words):
        read(tmp_path / name)
    with pytest.raises(TextError, match="cannot be read: No such file"):
        read(tmp_path / "absent.txt")


def test_a_template_is_used_where_there_is_one(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "tiny", layers=1)
    (row,) = prompt_rows(open_model(str(donor)), RIVER)
    tokenizer = AutoTokenizer.from_pretrained(donor)
    assert tokenizer.decode(row) == "<|bos|>user\nThe river<|eos|>\n<|bos|>assistant\n"
    (donor / "chat_template.jinja").unlink()
    (row,) = prompt_rows(open_model(str(donor)), RIVER)
    assert row == tokenizer("The river")["input_ids"]


def test_what_a_model_cannot_be_asked(tmp_path: Path) -> None:
    donor = make_donor(tmp_path / "tiny", layers=1)
    opened = open_model(str(donor))
    (length,) = map(len, prompt_rows(opened, RIVER))
    prompts, read = (
        [Prompt("A"), *RIVER.prompts],
        f"reads at most 512 tokens and {length + 500} are asked for",
    )
    for source, others in (
        ("own", "ask others with --prompts"),
        ("p.txt", "shorten or leave out that prompt"),
    ):
        asked_for = f"{read}: {length} of prompt 2 and 500 new ones"
        words = f"{asked_for}; choose at most {512 - length} with --max-new-tokens, or "
        with pytest.raises(MhconvertError, match=f"{words}{others}$"):
            prompt_rows(opened, Asked(prompts, source, 500))
        with pytest.raises(MhconvertError, match=f" of prompt 1 and 4 new ones; {others}$"):
            prompt_rows(opened, Asked([Prompt("river " * 512), *prompts], source, 4))
    (donor / "chat_template.jinja").write_text(
        "{% if 'boat' in messages[0]['content'] %}{{ raise_exception('no boats') }}{% endif %}x"
    )
    settings = EvalSettings(generation=True, prompts=str(tmp_path / "p.txt"), max_new_tokens=4)
    (tmp_path / "p.txt").write_text("a river\na boat\n")
    words = "tiny, prompt 2: the chat template refuses the prompt: no boats; take that prompt out"
    with pytest.raises(MhconvertError, match=words):
        api.evaluate(str(donor), settings, device="cpu")
    (donor / "chat_template.jinja").write_text("{% for m in messages %}{% endfor %}")
    with pytest.raises(MhconvertError, match="prompt 1: it has no tokens; take it out"):
        api.evaluate(str(donor), settings, device="cpu")
