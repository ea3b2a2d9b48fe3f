"""The text of a run: held-out rows never trained on, shares, and an order that a seed fixes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.errors import HealError, TextError
from mhconvert.heal.first_words import WORDS, answer_mark, first_words
from mhconvert.heal.heal_text import check, prepare
from mhconvert.heal.packed_rows import Rows
from tests.donors import make_tokenizer

EOS = 1


def no_sampling(rows: int, prompts: list[list[int]]) -> torch.Tensor:
    raise AssertionError(f"{rows} rows were to be sampled")


def documents(path: Path, count: int, words: int = 12, mark: str = "") -> Path:
    texts = [" ".join(f"{mark}{number}x{word}" for word in range(words)) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_documents_end_with_the_end_token_and_are_read_once(tmp_path: Path) -> None:
    tokenizer, file = make_tokenizer(), documents(tmp_path / "a.jsonl", 40)
    text = prepare(
        HealSettings(tokens=1, data={str(file): 1}, held_out=2), tokenizer, 320, 16, 20, no_sampling
    )
    starts = (text.train.positions == 0) & (torch.arange(16) > 0)
    before = text.train.ids.roll(1, dims=1)[starts]
    assert starts.sum() >= 5
    assert (before == EOS).all()
    rows = [tuple(row) for row in torch.cat((text.train.ids, text.held_out.ids)).tolist()]
    assert len(set(rows)) == len(rows) == 22


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 60)

    def ids(seed: int) -> torch.Tensor:
        wanted = HealSettings(tokens=1, data={str(file): 1}, seed=seed)
        text = prepare(wanted, make_tokenizer(), 320, 16, 20, no_sampling)
        return text.train.ids[text.order]

    assert torch.equal(ids(3), ids(3))
    assert not torch.equal(ids(3), ids(4))


def test_shares_of_a_mixture(tmp_path: Path) -> None:
    """Three rows of one source for each of the other, spread over the whole run."""
    tokenizer = make_tokenizer()
    one, other = (
        documents(tmp_path / "a.jsonl", 200, mark="a"),
        documents(tmp_path / "b.jsonl", 200, mark="b"),
    )
    wanted = HealSettings(tokens=1, data={str(one): 3, str(other): 1}, held_out=4)
    text = prepare(wanted, tokenizer, 320, 16, 40, no_sampling)
    of_other = torch.tensor(["b" in tokenizer.decode(row) for row in text.train.ids[text.order]])
    assert of_other.sum() == 10
    assert [int(part.sum()) for part in of_other.split(20)] == [5, 5]
    assert sum("b" in tokenizer.decode(row) for row in text.held_out.ids) == 1


def test_epochs_read_all_rows_before_any_again(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 5)
    wanted = HealSettings(tokens=1, data={str(file): 1}, epochs=9, held_out=1)
    text = prepare(wanted, make_tokenizer(), 320, 16, 60, no_sampling)
    there = len(text.train)
    assert 6 < there < 30
    turns = text.order.split(there)
    assert all(sorted(turn.tolist()) == list(range(there)) for turn in turns[:-1])
    assert not torch.equal(turns[0], turns[1])
    assert text.tokens == {str(file): there * 16}


def test_text_that_is_too_short_says_how_much_there_is(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 20)
    wanted = HealSettings(tokens=1, data={str(file): 1}, held_out=1)
    often = HealSettings(tokens=1, data={str(file): 1}, held_out=1, epochs=99)
    there = 16 * len(prepare(often, make_tokenizer(), 320, 16, 60, no_sampling).train)
    message = rf"has {there:,} tokens to train on .* and 960 are asked for.*--epochs \d"
    with pytest.raises(HealError, match=message):
        prepare(wanted, make_tokenizer(), 320, 16, 60, no_sampling)


def test_sampled_rows_are_one_text_each() -> None:
    asked: list[tuple[int, list[list[int]]]] = []

    def sample(rows: int, prompts: list[list[int]]) -> torch.Tensor:
        asked.append((rows, prompts))
        return torch.arange(rows * 8).view(rows, 8)

    text = prepare(HealSettings(tokens=1, held_out=2, epochs=2), make_tokenizer(), 320, 8, 10, sample)
    assert asked == [(2 + 5, [])]
    assert text.held_out.ids.tolist() == torch.arange(16).view(2, 8).tolist()
    assert text.train.predicted().all()
    assert len(text.order) == 10


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    tokenizer: Any = make_tokenizer()
    messages = [
        {"role": "user", "content": "How cold?"},
        {"role": "assistant", "content": "Very cold indeed."},
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(9)), encoding="utf-8")
    text = prepare(
        HealSettings(tokens=1, data={str(file): 1}, held_out=1), tokenizer, 320, 16, 4, no_sampling
    )
    assert tokenizer.decode(text.held_out.ids[0]).startswith("<|bos|>user\nHow cold?<|eos|>")


def test_a_token_that_the_models_have_no_row_for(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 40)
    wanted = HealSettings(tokens=1, data={str(file): 1}, held_out=1)
    largest = int(prepare(wanted, make_tokenizer(), 320, 16, 4, no_sampling).train.ids.max())
    with pytest.raises(TextError, match=rf"the text has token {largest} .* embedding has {largest} rows"):
        prepare(wanted, make_tokenizer(), largest, 16, 4, no_sampling)


def test_files_that_are_not_there_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"absent\.jsonl cannot be read: there is no such file"):
        check(HealSettings(tokens=1, data={str(tmp_path / "absent.jsonl"): 1, "self": 1}))


def test_a_file_in_two_sources_is_refused(tmp_path: Path) -> None:
    """Its held-out rows would be trained on."""
    file = documents(tmp_path / "many.jsonl", 9)
    with pytest.raises(HealError, match=r"many\.jsonl is in 2 sources; name it once"):
        check(HealSettings(tokens=1, data=[str(file), str(tmp_path / "m*ny.jsonl")]))


def test_a_share_of_less_than_a_row_is_left_out(tmp_path: Path) -> None:
    file = documents(tmp_path / "a.jsonl", 60)
    wanted = HealSettings(tokens=1, data={str(file): 1000, "self": 1}, held_out=2)
    assert len(prepare(wanted, make_tokenizer(), 320, 16, 20, no_sampling).order) == 20


def test_what_the_template_refuses_is_an_error_or_skipped(tmp_path: Path) -> None:
    """Without the bad record, or with it and `skip_bad`, the rows are the same."""
    tokenizer: Any = make_tokenizer()
    refusal = "{{ raise_exception('System role not supported') }}"
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}"
        + refusal
        + "{% endif %}<|bos|>"
        + ("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    )
    chats = [[{"role": "user", "content": f"How cold is it on day {day}?"}] for day in range(30)]

    def rows(turns: list[list[dict[str, str]]], **chosen: Any) -> Any:
        file = tmp_path / "chat.jsonl"
        file.write_text("\n".join(json.dumps({"messages": each}) for each in turns), encoding="utf-8")
        wanted = HealSettings(tokens=1, data={str(file): 1}, held_out=1, **chosen)
        return prepare(wanted, tokenizer, 320, 16, 8, no_sampling)

    bad = [*chats[:4], [{"role": "system", "content": "Be brief."}, *chats[4]], *chats[4:]]
    with pytest.raises(
        TextError, match=r"chat\.jsonl, line 5: the chat template refuses it: System role not supported"
    ):
        rows(bad)
    good, left = rows(chats), rows(bad, skip_bad=True)
    assert left.train.ids.equal(good.train.ids)
    assert left.held_out.ids.equal(good.held_out.ids)
    assert (good.skipped, left.skipped) == ({}, {str(tmp_path / "chat.jsonl"): 1})
    with pytest.raises(HealError, match=r"chat\.jsonl, without 29 records that were skipped, has "):
        rows([chats[0], *[bad[4]] * 29], skip_bad=True)


def test_sampled_rows_beside_files_begin_with_their_first_words(tmp_path: Path) -> None:
    """Of rows that are trained on, whatever the order of the sources."""
    tokenizer, file = make_tokenizer(), documents(tmp_path / "a.jsonl", 60)
    asked: list[list[list[int]]] = []

    def sample(rows: int, prompts: list[list[int]]) -> torch.Tensor:
        asked.append(prompts)
        return torch.zeros(rows, 16, dtype=torch.long)

    for data in ({"self": 1, str(file): 1}, {str(file): 1, "self": 1}):
        wanted = HealSettings(tokens=1, data=data, held_out=2)
        text = prepare(wanted, tokenizer, 320, 16, 20, sample)
        assert asked[-1] == first_words(text.train[: 20 // 2], tokenizer)
        assert int((text.train.ids == 0).all(1)[text.order].sum()) == 10
    assert len(asked[0]) == 10


def row(*texts: list[int]) -> Rows:
    """One row of these texts."""
    positions = [place for text in texts for place in range(len(text))]
    return Rows(torch.tensor([[token for text in texts for token in text]]), torch.tensor([positions]))


def test_first_words_are_of_a_text_that_begins_in_the_row() -> None:
    tokenizer, long = make_tokenizer(), list(range(100, 180))
    tokenizer.chat_template = None
    assert first_words(row(long), tokenizer) == [long[:WORDS]]
    assert first_words(row(long[:30], long[40:]), tokenizer) == [long[40 : 40 + WORDS]]
    assert first_words(row(long[:60], long[70:]), tokenizer) == [long[:WORDS]]  # ten tokens are no beginning
    assert first_words(row(long[:8]), tokenizer) == [long[:2]]


def test_first_words_of_a_conversation_end_where_the_answer_begins() -> None:
    tokenizer: Any = make_tokenizer()
    turns = [{"role": "user", "content": "How cold?"}, {"role": "assistant", "content": "Very cold. " * 9}]
    chat = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
    question = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert answer_mark(tokenizer) == tokenizer("<|bos|>assistant\n")["input_ids"]
    [found] = first_words(row(list(range(100, 110)), chat), tokenizer)
    assert tokenizer.decode(found) == question
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert answer_mark(tokenizer) == []


def test_first_words_have_the_token_that_begins_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mhconvert.heal.first_words.start_of_text", lambda _: [0])
    inside, whole = list(range(100, 116)), [0, *range(100, 115)]
    assert first_words(row(inside), make_tokenizer()) == [[0, *inside[:4]]]
    assert first_words(row(whole), make_tokenizer()) == [whole[:4]]
