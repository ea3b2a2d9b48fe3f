"""The report page: it says what was measured, and nothing in it runs or is fetched."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mhconvert.errors import OutputError
from mhconvert.eval.page import page, plots
from mhconvert.eval.page.blocks import Code, Paragraph, Table, to_html, to_markdown
from mhconvert.eval.page.layer_kinds import layer_kinds
from mhconvert.eval.text_spread import over_texts
from tests.eval.page_sample import GENERATION, KINDS, RECIPE, REPORTS, RESULT, measured, model, report

HOSTILE = "<script>alert('x')</script> & $a_b$ | `c`"


class Reader(HTMLParser):
    """Checks that elements close in order, and gathers them, their attributes and the text."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def changed(**parts: Any) -> dict[str, Any]:
    return copy.deepcopy(RESULT) | parts


def two_models() -> dict[str, Any]:
    """RESULT without its last two models."""
    result = changed()
    for text in result["texts"]:
        text["models"] = text["models"][:2]
    for one in result["tasks"]:
        for found in one["metrics"]:
            found["models"] = found["models"][:2]
    for key in ("average", "retrieval", "generation"):
        result[key]["models"] = result[key]["models"][:2]
    return result | {"models": result["models"][:2], "cache": result["cache"][:2]}


def test_the_numbers_are_the_measured_ones() -> None:
    text = Reader(page.html(RESULT, REPORTS, RECIPE)).text
    for words in (
        "3 conversions of smollm2-135m",
        "mla-half (MLA, converted) keeps 50 % of the KV cache, and its perplexity is 1.024 times the donor's on "
        "wiki.test.raw and 1.024 times on books.txt. Its accuracy over 2 tasks is 0.4 points (± 0.7) below "
        "the donor's, which is inside the noise. It recalls 100 % of the numbers hidden in long text; the donor 95 %. "
        "In its own texts it writes as its donor does.",
        "In its own texts it loops in 80 % of its texts, drifts after about 3 tokens, repeats itself more.",
        "texts that loop sampled 25.0 % another seed +1.0 26.0 ± 2.0 % +1.0 ± 1.0 ≈ 150.0 ± 2.0 % +125.0 ± 1.0",
        "the donor's perplexity on sampled texts 4 another seed × 1.010 4.5 × 1.010 ≈ 4.5 × 3.490",
        "tokens until half of them are told apart — never 3 7",
        "our 40 prompts, texts of at most 128 tokens",
        "kind mla-half mla-eighth mla-eighth-healed story 0.01 1.25 0.5 json 0.02 2.5 1",
        "which is more than noise",
        "23.3 × 1.024",
        "43.0 ± 2.2 % 42.6 ± 2.2 % −0.4 ± 1.1 ≈ 28.1 ± 2.0 % −14.9 ± 1.0",
        "31.25 ± 0.9 32.5 ± 0.9 +1.25 ± 0.45",
        "word_perplexity (lower is better), 0-shot, 500 samples",
        "acc_norm, 0-shot, 500 samples, from hellaswag_val.jsonl",
        "within 2 standard errors of the paired difference",
        "16,384 tokens",
        "95 ± 4 % recalled, 0.19 nats a token; 3.02 where the text has no such number",
        "3,276,800 tokens in 400 steps",
        "5,760 50 % 22.5 KiB 147,046,464",
        "mla-half 2,048 41.2 66.0 × 1.6",
        "Decoding: batch 8, float32, cpu",
        "kv_budget: 0.5",
        "5:12",
        "9f2c4d1e",
    ):
        assert words in text, words


def test_many_texts_have_a_table_with_their_mean_and_the_worst() -> None:
    result = two_models()
    for at, name in enumerate(("fiction", "code", "chat")):
        text = copy.deepcopy(result["texts"][0]) | {"text": name}
        ratio = 1.5 if name == "code" else 1.05
        text["models"][1] |= {"perplexity": 22.75 * ratio, "ratio": ratio, "ratio_stderr": 0.01}
        text["models"][1]["kl_stderr"] = 0.002
        result["texts"][at : at + 1] = [text]
    result["over_texts"] = over_texts(result["texts"])
    text = Reader(page.html(result)).text
    for words in (
        "its perplexity is 1.183 times the donor's in the mean of 3 texts, at worst 1.500 times on code.",
        "Code is much worse than the other texts, by more than noise: perplexity × 1.500 beside × 1.050.",
        "fiction 16 × 1,024 tokens 22.75 × 1.050 ± 0.01 KL 0.052 ± 0.002, top-1 86.7 %",
        "mean — × 1.183 KL 0.052 worst — × 1.500 code",
    ):
        assert words in text, words
    assert "its perplexity is not finite on code" in page.html(
        result
        | {"over_texts": [{}, {"kl": 1.0, "ratio": None, "worst_ratio": None, "worst": "code", "worse": []}]}
    )


def test_mmlu_and_languages_are_told_apart_from_the_average() -> None:
    result = two_models()
    cells = [measured(0.4, 0.02, None, None), measured(0.36, 0.02, -0.04, False)]
    languages = [measured(0.5, 0.02, None, None), measured(0.499, 0.02, -0.001, True)]
    result["apart"] = [
        {"name": "MMLU", "tasks": ["mmlu"], "models": cells},
        {"name": "de", "tasks": ["xnli_de", "hellaswag_de"], "models": languages},
    ]
    text = Reader(page.html(result)).text
    for words in (
        "MMLU of 1 task 40.0 ± 2.0 % 36.0 ± 2.0 % −4.0 ± 1.0 de of 2 tasks 50.0 ± 2.0 %",
        "On MMLU alone, its accuracy over 1 task is 4.0 points (± 1.0) below the donor's, which is more than noise.",
        "On de alone, its accuracy over 2 tasks is 0.1 points (± 1.0) below the donor's, which is inside the noise.",
        "have means of their own and are not in the average",
    ):
        assert words in text, words


def test_a_difference_is_coloured_only_outside_the_noise_and_by_the_metrics_direction() -> None:
    found = page.html(RESULT).replace("\u00a0", " ")
    cells = dict(re.findall(r"<td(.*?)>(.*?)<small>", found))
    kinds = {text: attributes for attributes, text in re.findall(r"<td([^>]*)>([^<]*)<small>", found)}
    assert cells
    assert kinds["42.6 ± 2.2 %"] == ""
    assert kinds["28.1 ± 2.0 %"] == ' class="worse"'
    assert kinds["250 ± 8"] == ' class="worse"'
    assert 'class="better">55.0 ± 2.0 %<small>+2.1 ± 1.0<' in found


def test_markdown_has_the_same_tables() -> None:
    text = page.markdown(RESULT, REPORTS, RECIPE)
    assert text.startswith("# 3 conversions of smollm2-135m\n\nmla-half (MLA, converted) keeps 50 %")
    assert "| 42.6 ± 2.2 % (−0.4 ± 1.1 ≈) |" in text
    assert "| **average (of 2 tasks)** | **49.0 ± 1.4 %** |" in text
    assert f"```yaml\n{RECIPE}```" in text
    assert "<svg" not in text
    assert "| 29 | 0.0186 | 0.186 |" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) > 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_greedy_texts_are_folded_and_marked_where_they_leave_the_donors() -> None:
    result = two_models()
    model, first = result["generation"]["models"][1], result["generation"]["models"][0]["texts"]
    words = (
        "What does a river do? smollm2-135m A river runs to the sea mla-half, the same A river runs & sings"
    )
    written = page.html(result, REPORTS)
    assert words in Reader(written).text
    folded = written.split("<details><summary>Greedy texts")[1].split("</details>")[0]
    assert "<dt>mla-half, the same</dt><dd dir=auto>A river runs <mark>&amp;</mark> sings</dd>" in folded
    assert "Greedy texts" not in page.markdown(result, REPORTS)
    hostile = f"{HOSTILE}\n\x00"
    result["generation"]["asked"][0] = first[0]["text"] = hostile
    model["texts"][0] = {"text": hostile, "same_characters": 8, "same_tokens": 1}
    reader = Reader(escaped := page.html(result, REPORTS))
    assert "script" not in reader.tags
    assert "\x00" not in escaped
    assert (
        reader.text.count("mla-half, the same for 1 token <script> alert('x')</script> & $a_b$ | `c` \ufffd")
        == 1
    )
    model["texts"] = None
    first.clear()
    assert "Greedy texts" not in page.html(result, REPORTS)


@pytest.mark.parametrize("name", [HOSTILE, "_" + HOSTILE, "a" * 200])
def test_names_are_text(name: str) -> None:
    result = changed()
    result["models"][1]["name"] = name
    result["models"][2]["reference"] = name
    result["texts"][0]["text"] = name
    result["tasks"][0]["task"] = name
    result["tasks"][0]["local"] = name
    result["settings"]["suite"] = name
    result["generation"]["prompts"] = name
    for one in result["generation"]["models"][1:]:
        one["kl_by"]["kind"] = {name: 0.5}
    written = page.html(result, REPORTS, name)
    reader = Reader(written)
    assert "script" not in reader.tags
    assert " ".join(name.split()) in reader.text
    made = page.markdown(result, REPORTS, name)
    outside = re.sub(r"```.*?```", "", made.replace(f"\n{name}\n", "\n"), flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside)


def test_the_page_is_alone_and_runs_nothing() -> None:
    written = page.html(RESULT, REPORTS, RECIPE)
    reader = Reader(written)
    assert not {"script", "link", "iframe", "img", "object"} & set(reader.tags)
    for name, value in reader.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "srcset")
        if name.endswith("href"):
            assert value.startswith("#")
    assert "url(http" not in written
    assert "@import" not in written
    ids = [value for name, value in reader.attributes if name == "id"]
    assert all(f"#{one}" in written for one in ids)


def test_the_same_arguments_make_the_same_page() -> None:
    first = page.html(RESULT, REPORTS, RECIPE)
    assert first == page.html(copy.deepcopy(RESULT), copy.deepcopy(REPORTS), RECIPE)
    assert first.count("<svg") == 3  # a text each, and the layers
    assert "#0102" not in first  # a colour that stands for one of the page's
    assert "#0203" not in first
    assert "var(--series-1)" in first


def test_a_model_that_reads_less_has_fewer_lengths() -> None:
    result = two_models()
    shorter = result["retrieval"]["models"][1]
    result["retrieval"]["models"][1] = shorter | {
        "lengths": [256],
        "recalled": shorter["recalled"][:1],
        "nll": shorter["nll"][:1],
    }
    text = page.markdown(result)
    assert text.count("| 256 |") == 2
    assert text.count("| 1,024 |") == 1


def test_without_matplotlib_the_numbers_are_in_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = page.html(RESULT, REPORTS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not plots.available()
    written = page.html(RESULT, REPORTS)
    assert "<svg" not in written
    text = Reader(written).text
    assert text.count("pip install 'mhconvert[plot]'") == 2
    for words in (
        "perplexity on books.txt",
        "mla-eighth 12.5 % × 8.100",
        "mla-eighth, mla-eighth-healed",
        "29 0.0186 0.186",
    ):
        assert words in text
        assert words in Reader(drawn).text


def test_a_result_with_little_in_it() -> None:
    bare = {
        "models": [model("tiny", "donor")],
        "texts": [],
        "tasks": [],
        "average": None,
        "retrieval": None,
        "settings": {},
        "versions": {},
        "seconds": None,
    }
    text = Reader(page.html(bare)).text
    assert "tiny alone was measured" in text
    for absent in ("Tasks", "Retrieval", "Cache and speed", "Recipe", "Error by layer", "None", "nan"):
        assert absent not in text
    assert page.markdown(bare).startswith("# tiny, evaluated\n")


def test_what_is_not_finite_or_not_known_is_said() -> None:
    result = changed()
    result["texts"][0]["models"][2] = {"perplexity": None, "kl": None, "top1_agreement": None}
    result["texts"][1]["models"][3] = {"perplexity": float("inf"), "kl": float("inf"), "top1_agreement": 0.1}
    result["tasks"][0]["metrics"][0]["models"][2] = dict.fromkeys(measured(0, 0, 0, None))
    result["retrieval"]["models"][1] = None
    unknown = dict.fromkeys(("kl", "kl_stderr", "perplexity", "drift_tokens"))
    nothing = dict.fromkeys(("value", "stderr", "difference", "difference_stderr", "within_noise"))
    figures = dict.fromkeys(GENERATION["models"][1]["sampled"], nothing)
    result["generation"]["models"][1] |= {**unknown, "sampled": figures, "greedy": figures}
    written = page.html(result, [{}, {"layers": []}])
    said = Reader(written).text
    assert "books.txt; it is not finite on wiki.test.raw" in said
    assert "wiki.test.raw; it is not finite on books.txt" in said
    assert "inf" not in re.findall(r"\w+", said)
    assert "<td>—</td>" in written
    assert "nan" not in said
    del result["cache"]
    assert "KV cache kept" not in page.html(result)


def test_layers_without_error_are_named_and_not_drawn() -> None:
    exact = report(0.0, 46080.0)
    text = Reader(page.html(two_models(), [exact])).text
    assert "Without error: mla-half." in text
    assert "<svg" not in page.html(two_models(), [exact])


def test_the_donors_figures_are_found_in_any_report() -> None:
    routed = report(0.01, 5760.0) | {"active_heads": {"donor": 270, "converted": 202}}
    text = Reader(page.html(RESULT, [REPORTS[0], routed])).text
    assert "smollm2-135m 11,520 100 % 45 KiB 134,515,008 270 mla-half" in text
    assert "147,046,464 — mla-eighth 1,440 12.5 % 5.625 KiB 147,046,464 202 mla-eighth-healed" in text


def test_a_model_by_itself_has_no_curve() -> None:
    result = two_models()
    assert "What the cache buys" not in page.html(result)
    assert "mla-half beside its donor smollm2-135m" in page.html(result)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_donor_that_was_left_out_is_not_the_first_conversion(tmp_path: Path, kept: int) -> None:
    """vLLM did not load the donor: reports, sizes and differences are of those that are there."""
    folders = [tmp_path / f"made-{number}" for number in range(kept)]
    for folder, found in zip(folders, REPORTS, strict=False):
        folder.mkdir()
        (folder / "report.json").write_text(json.dumps(found), encoding="utf-8")
    average = {
        "tasks": ["piqa"],
        "models": [measured(0.5, 0.01, -0.02 if n else None, n < 1) for n in range(kept)],
    }
    made = [model(folder.name, "converted", "mla") | {"reference": str(folder)} for folder in folders]
    rows = [{"task": "piqa", "metrics": [{"metric": "acc", "primary": True, "models": average["models"]}]}]
    result = {
        "models": made,
        "left_out": [{"reference": "gemma-9", "why": "vllm does not take it"}],
        "tasks": rows,
        "average": average,
    }
    reports, _ = page.sources(result)
    assert [each["kv_bytes_per_token"]["converted"] for each in reports] == [23040.0, 5760.0][:kept]
    text = page.markdown(result, reports)
    assert "gemma-9 is left out: vllm does not take it" in text
    assert "beside its donor" not in text
    assert "the donor's." not in text
    assert "22.5 KiB" in text
    assert "45 KiB" not in text  # the donor's, which is not there
    assert ("2.0 points (± 0.5) below made-0's" in text) is (kept == 2)
    assert f"the difference from {'made-0'}." in text


def test_write_goes_by_the_ending(tmp_path: Path) -> None:
    page.write(tmp_path / "report.html", RESULT, REPORTS, RECIPE)
    page.write(tmp_path / "report.md", RESULT, REPORTS, RECIPE)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.html(RESULT, REPORTS, RECIPE)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == page.markdown(RESULT, REPORTS, RECIPE)
    with pytest.raises(OutputError, match=r"report\.pdf ends in none of \.html, \.md"):
        page.write(tmp_path / "report.pdf", RESULT)
    with pytest.raises(OutputError, match="there is no folder"):
        page.write(tmp_path / "absent" / "report.md", RESULT)
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(OutputError, match="it is a folder"):
        page.write(tmp_path / "folder.md", RESULT)


def test_blocks_escape() -> None:
    assert to_html(Paragraph("<b>")) == "<p>&lt;b&gt;</p>"
    assert to_markdown(Paragraph("a_b <i>\n\nc")) == r"a\_b \<i\> c"
    assert to_markdown(Code("a\n```\nb")) == "````yaml\na\n```\nb\n````"
    assert "| a \\| b |" in to_markdown(Table(["x"], [["a | b"]]))


def test_layers_of_several_kinds_are_drawn_once_for_a_conversion_and_what_is_healed_of_it() -> None:
    """The map has a coloured cell for each layer; beside the picture of the prices are their numbers."""
    made = [dict(report) for report in REPORTS]
    for one in made[1:]:
        one["layers"] = KINDS
    blocks = layer_kinds(RESULT, made)
    written = "".join(map(to_html, blocks))
    read = Reader(written)
    words = read.text.replace("\u00a0", " ")
    assert "Kinds of layers mla-eighth, mla-eighth-healed Each layer's kind" in words
    assert "layers 0 to 2 full 100 % windowed 12.5 % linear 3.12 %" in words
    assert [value for name, value in read.attributes if name == "class" and "kind-" in value] == [
        f"kind kind-{kind}" for kind in ("full", "windowed", "linear")
    ]
    assert written.count('aria-label="Price of each layer"') == 1
    assert "1 windowed 1,024 12.5 % 0.0625 0.5" in words
    assert layer_kinds(RESULT, REPORTS) == []
    text = "\n".join(map(to_markdown, blocks))
    assert "| layers 0 to 2 | full (100 %) | windowed (12.5 %) | linear (3.12 %) |" in text
    assert "| 2 | linear | — | 3.12 % | — | 0.01 |" in text
