"""Texts beside the donor's: where they part, and how much of them is kept."""

from __future__ import annotations

from mhconvert.eval.writing.continuations import Text
from mhconvert.eval.writing.greedy_texts import PROMPT_LIMIT, TEXT_LIMIT, asked, beside, plain, without_texts
from mhconvert.eval.writing.prompts import Prompt
from mhconvert.eval.writing.writing_figures import Divergence


class Letters:
    """A tokenizer of single characters, whose token 0 is special."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(token) for token in tokens if token or not skip_special_tokens)


def said(words: str) -> Text:
    return {"tokens": [*map(ord, words), 0], "ended": True, "nats": 1.0}


def test_where_texts_part() -> None:
    texts = [["a river", "the sea"], ["a road", "the sea"]]
    theirs, ours = (plain(Letters(), [said(words) for words in each]) for each in texts)
    assert theirs == [{"text": "a river"}, {"text": "the sea"}]
    assert beside(ours, theirs, [Divergence(3, -1.0), Divergence(None, None)]) == [
        {"text": "a road", "same_characters": 3, "same_tokens": 3},
        {"text": "the sea", "same_characters": 7, "same_tokens": None},
    ]


def test_what_is_long_is_cut() -> None:
    [text] = plain(Letters(), [said("a" * (TEXT_LIMIT + 1))])
    assert text["text"] == "a" * TEXT_LIMIT + "…"
    assert asked([Prompt("b" * PROMPT_LIMIT), Prompt("b" * 900)]) == [
        "b" * PROMPT_LIMIT,
        "b" * PROMPT_LIMIT + "…",
    ]


def test_what_is_kept_has_figures_alone() -> None:
    found = {"count": 1, "asked": ["a"], "models": [{"kl": 0.1, "texts": [{"text": "b"}]}]}
    assert without_texts(found) == {"count": 1, "models": [{"kl": 0.1}]}
    assert without_texts(None) is None
