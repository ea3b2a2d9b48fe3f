"""Calibration rows: drawn evenly and without repetition, the same for a seed, and refused with a reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhconvert.convert.calibration import token_rows
from mhconvert.convert.calibration.token_rows import (
    CHARACTERS_A_TOKEN,
    random_ids,
    require_embedded,
    sampled_rows,
    text_rows,
)
from mhconvert.errors import CalibrationError, CheckpointError, TextError
from mhconvert.progress import Progress, ignore
from tests.convert.conversions import donor_model
from tests.donors import make_tokenizer

LENGTH = 16


class Characters:
    """A tokenizer of one token a character, its code point; bos_token_id 1 where `adds_bos`."""

    bos_token_id = 1

    def __init__(self, adds_bos: bool = False):
        self.adds_bos = adds_bos

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [1] * (self.adds_bos and add_special_tokens) + [ord(c) for c in text]}


def written(path: Path, first: int, count: int) -> str:
    """A text of `count` different characters, from code point `first` on."""
    path.write_text("".join(map(chr, range(first, first + count))), encoding="utf-8")
    return str(path)


def drawn(*sources: str, rows: int = 4, seed: int = 0, tokenizer: Any = None) -> Tensor:
    return text_rows(sources, tokenizer or Characters(), rows, LENGTH, seed)[0]


def test_rows_are_shared_evenly_among_unequal_files(tmp_path: Path) -> None:
    sources = [written(tmp_path / f"{n}.txt", 0x1000 * n, 0x100 * n) for n in (1, 2, 3)]
    rows = drawn(*sources, rows=24)
    assert rows.shape == (24, LENGTH)
    assert rows.dtype == torch.int64
    assert Counter((rows[:, 0] // 0x1000).tolist()) == {1: 8, 2: 8, 3: 8}


def test_a_short_file_gives_what_it_has_and_the_others_the_rest(tmp_path: Path) -> None:
    sources = [written(tmp_path / "a.txt", 0x1000, 3 * LENGTH), written(tmp_path / "b.txt", 0x2000, 0x400)]
    rows = drawn(*sources, rows=13)
    assert Counter((rows[:, 0] // 0x1000).tolist()) == {1: 3, 2: 10}


def test_no_token_is_drawn_twice(tmp_path: Path) -> None:
    count = 40 * LENGTH
    rows = drawn(written(tmp_path / "a.txt", 0x1000, count), rows=40)
    assert sorted(rows.flatten().tolist()) == list(range(0x1000, 0x1000 + count))
    # Rows are pieces of the text: they break at most where one window of it ends and another begins.
    assert (rows.diff(dim=1) != 1).sum() <= count // (LENGTH * CHARACTERS_A_TOKEN)


def test_a_seed_fixes_the_rows(tmp_path: Path) -> None:
    source = written(tmp_path / "a.txt", 0x1000, 0x1000)
    assert torch.equal(drawn(source, seed=3), drawn(source, seed=3))
    assert not torch.equal(drawn(source, seed=3), drawn(source, seed=4))
    starts = drawn(source, rows=8)[:, 0]
    assert not torch.equal(starts, starts.sort().values)  # taken from all over the text


@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_beginning_of_text_stands_where_the_tokenizer_puts_it(tmp_path: Path, adds_bos: bool) -> None:
    rows = drawn(written(tmp_path / "a.txt", 0x1000, 0x400), tokenizer=Characters(adds_bos))
    assert rows.shape == (4, LENGTH)
    assert (rows[:, 0] == 1).tolist() == [adds_bos] * 4
    assert not (rows[:, 1:] == 1).any()


def test_too_little_text(tmp_path: Path) -> None:
    source = written(tmp_path / "a.txt", 0x1000, 3 * LENGTH + 5)
    message = (
        r"the calibration text has 48 tokens in rows of 16, and 64 are needed \(held-out rows included\); "
        r"add text, or ask for fewer with --calibration-tokens"
    )
    with pytest.raises(CalibrationError, match=message):
        drawn(source)
    assert drawn(source, rows=3).shape == (3, LENGTH)


def jsonl(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_jsonl_documents(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", '{"text": "abcdefg"}', "", '{"id": 3, "text": "hijklmn"}')
    assert drawn(source, rows=1).tolist() == [[ord(c) for c in "abcdefg\n\nhijklmn"]]


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_a_line_of_jsonl_ends_at_a_newline_only(tmp_path: Path, separator: str) -> None:
    line = json.dumps({"text": f"abcdefgh{separator}ijklmnop"}, ensure_ascii=False)
    rows = drawn(jsonl(tmp_path / "a.jsonl", line), rows=1)
    assert rows[0, 8] == ord(separator)


def test_a_quoted_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "a.txt", 0x1000, 0x100)
    assert drawn("~/a.txt").equal(drawn("~/*.txt"))


def test_globs(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    written(tmp_path / "deep" / "a.txt", 0x1000, 0x100)
    written(tmp_path / "deep" / "er" / "b.txt", 0x2000, 0x100)
    rows = drawn(str(tmp_path / "**" / "*.txt"), rows=6)
    assert Counter((rows[:, 0] // 0x1000).tolist()) == {1: 3, 2: 3}
    assert Counter((drawn(str(tmp_path / "deep" / "[a-z].txt"))[:, 0] // 0x1000).tolist()) == {1: 4}
    with pytest.raises(TextError, match=r"no text file matches '.*\*\.jsonl'"):
        drawn(str(tmp_path / "*.jsonl"))


def test_a_file_whose_name_looks_like_a_glob(tmp_path: Path) -> None:
    assert drawn(written(tmp_path / "part[1].txt", 0x1000, 0x100)).shape == (4, LENGTH)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"absent\.txt cannot be read: No such file or directory"):
        drawn(str(tmp_path / "absent.txt"))
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(TextError, match=r"latin\.txt cannot be read: it is not UTF-8 text"):
        drawn(str(tmp_path / "latin.txt"))
    with pytest.raises(TextError, match=r"is a folder; name its files, for example '.*/\*\.jsonl'"):
        drawn(str(tmp_path))


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Stream(list):
        def take(self, count: int) -> Stream:
            return Stream(self[:count])

    def load_dataset(*arguments: Any, **options: Any) -> Stream:
        calls.append((*arguments, options))
        if arguments[0] == "org/broken":
            raise RuntimeError("no such\nrepository")
        return Stream([{"text": "abcdefgh" * 4}] * 3)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert drawn("org/texts:small").shape == (4, LENGTH)
    assert calls == [("org/texts", "small", {"split": "train", "streaming": True})]
    with pytest.raises(TextError, match="'org/broken' is neither a file nor a dataset.*no such repository"):
        drawn("org/broken")


def sampled(rows: int = 5, length: int = 12, seed: int = 0, listener: Any = ignore) -> Tensor:
    return sampled_rows(donor_model(), make_tokenizer(), rows, length, seed, listener)


def test_ids_are_drawn_as_often_as_they_are_likely() -> None:
    likely = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    ids = random_ids(likely.expand(20_000, -1), torch.Generator().manual_seed(0)).flatten()
    found = torch.bincount(ids, minlength=6) / len(ids)
    assert found[likely == 0].sum() == 0
    assert (found - likely).abs().max() < 0.015  # four standard deviations


def test_the_largest_random_number_draws_the_last_likely_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))
    assert random_ids(torch.tensor([[0.25, 0.75, 0.0, 0.0]]), torch.Generator()).tolist() == [[1]]


@pytest.mark.parametrize("value", [float("nan"), 0.0, float("inf")])
def test_predictions_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match="predictions are not finite"):
        random_ids(torch.tensor([[0.5, 0.5], [value, value]]), torch.Generator())


def test_short_rows_are_not_sampled_all_at_once() -> None:
    counts = {length: token_rows.batches_of(2048, length) for length in (8, 256, 512, 1024)}
    assert counts == {8: 32, 256: 32, 512: 64, 1024: 64}


def test_sampled_rows_are_the_same_for_a_seed_and_in_range() -> None:
    rows = sampled()
    assert rows.shape == (5, 12)
    assert rows.dtype == torch.int64
    assert rows.min() >= 0
    assert rows.max() < 320
    assert torch.equal(sampled(), rows)
    assert not torch.equal(sampled(seed=1), rows)
    assert (rows[:, 0] > 1).all()  # an ordinary token begins, none of the special ones


def test_every_second_row_continues_a_prompt() -> None:
    """Prompts of different lengths in one batch, used again from the first; each continues as it does alone."""
    prompts, model = [[5, 6, 7, 8], [9]], donor_model()
    rows = sampled_rows(model, make_tokenizer(), 7, 12, 0, ignore, prompts)
    assert [row[:4].tolist() for row in rows[1::4]] == [prompts[0]] * 2
    assert rows[3, 0] == 9
    assert (rows[::2, 0] > 1).all()
    assert len({tuple(row) for row in rows.tolist()}) == 7
    assert torch.equal(sampled_rows(model, make_tokenizer(), 7, 12, 0, ignore, ()), sampled(rows=7))


def test_a_continuation_follows_the_models_predictions() -> None:
    """The most likely token after the whole text so far, where the random number always takes it."""
    model = donor_model()
    with pytest.MonkeyPatch.context() as greedy:
        greedy.setattr(token_rows, "random_ids", lambda likely, _: likely.argmax(-1, keepdim=True))
        *_, found = token_rows.continued(model, [[5, 6, 7], [9]], 10, torch.Generator())
    for row, given in zip(found, (3, 1), strict=True):
        alone = model.generate(
            row[None, :given], max_new_tokens=10 - given, do_sample=False, eos_token_id=None
        )
        assert torch.equal(alone[0], row)


def test_sampled_rows_begin_with_tokens_that_the_model_has() -> None:
    """A tokenizer that somebody added many tokens to, and no rows to the embedding."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<t{number}>" for number in range(3000)])
    rows = sampled_rows(donor_model(), tokenizer, 40, 9, 0, ignore)
    assert rows.max() < 320
    assert rows[:, 0].unique().numel() > 20
    assert rows.max() >= 300
    assert sampled_rows(donor_model(), tokenizer, 40, 9, 0, ignore, vocab_size=300).max() < 300


def test_a_token_without_an_embedding_is_named() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    first = len(tokenizer) - 2
    require_embedded(torch.tensor([[first - 1, 0]]), tokenizer, first)
    require_embedded(torch.tensor([], dtype=torch.long), tokenizer, first)
    message = (
        rf"the text has token {first} \('<tool>'\), and the model's embedding has {first} rows, none for it"
    )
    with pytest.raises(TextError, match=message):
        require_embedded(torch.tensor([[3, first]]), tokenizer, first)


def test_sampling_touches_no_global_random_state() -> None:
    model, tokenizer = donor_model(), make_tokenizer()
    before = torch.get_rng_state()
    sampled_rows(model, tokenizer, 2, 8, 0, ignore)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_rows_beyond_one_batch_and_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_rows, "SAMPLED_ROWS", 20)
    monkeypatch.setattr(token_rows, "SAMPLED_TOKENS", 0)
    events: list[Progress] = []
    rows = sampled(rows=40, length=9, listener=events.append)
    assert rows.shape == (40, 9)
    assert len({tuple(row) for row in rows.tolist()}) == 40
    done = [*range(20, 181, 20), *range(180 + 20, 361, 20)]  # two batches of one size
    assert [(p.stage, p.done, p.total) for p in events] == [("calibrate", each, 360) for each in done]
