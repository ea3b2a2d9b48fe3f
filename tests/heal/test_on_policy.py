"""Text that the student writes while it trains: which rows, after which words, what is dropped, and a resume."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor

from mhconvert import api
from mhconvert.convert import open_model
from mhconvert.convert.calibration import token_rows
from mhconvert.convert.methods.dha.settings import DHASettings
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.methods.moh.settings import MoHSettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.errors import HealError
from mhconvert.heal import fusion, on_policy, open_models
from mhconvert.heal.heal_text import HealText
from mhconvert.heal.metrics import read
from mhconvert.heal.on_policy import OwnText, text_of, written
from mhconvert.heal.schedule import Steps
from mhconvert.heal.student import Student, Teacher, Weights, choose_trained
from mhconvert.progress import Progress, ignore
from tests.convert.conversions import converted, donor_model
from tests.donors import TEXT, make_checkpoint, make_tokenizer
from tests.heal.models import pair, rows

LENGTH = 24


def plan(steps: int = 8, batch_rows: int = 2, lm_from: int | None = None) -> Steps:
    return Steps(steps, LENGTH, batch_rows, 1, steps if lm_from is None else lm_from, 1, 1)


def heal_text(count: int = 16) -> HealText:
    train = rows(count, LENGTH)
    return HealText(train, rows(1, LENGTH), torch.arange(count), {}, {})


def writer(model: Any, share: float = 0.5, steps: Steps | None = None) -> OwnText:
    steps = steps or plan()
    own = written(steps, share)
    return OwnText(Accelerator(cpu=True), Student(model, 320), make_tokenizer(), steps, own, 0, None)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_own_rows_are_evenly_spread_and_none_is_of_the_text_alone(share: float) -> None:
    own = written(plan(steps=100, batch_rows=4, lm_from=80), share)
    assert not own[320:].any()
    assert all(abs(int(own[:end].sum()) - share * end) < 1 for end in range(1, 321))
    assert not written(plan(), None).any()


def test_every_text_row_is_read_once_and_those_that_lend_words_are_spread() -> None:
    order, own = torch.tensor([7, 3, 5, 1]), written(plan(steps=4), 0.5)
    found = text_of(order, own)
    assert found[~own].tolist() == [7, 3, 5, 1]
    assert found[own].tolist() == [7, 3, 5, 1]
    many = written(plan(steps=5), 0.8)
    assert text_of(order, many)[many].tolist() == [7, 7, 7, 7, 3, 3, 3, 3]
    assert text_of(order, torch.zeros(3, dtype=torch.bool)).tolist() == [7, 3, 5]


def fusing() -> Any:
    """A model whose heads are drawn together, some way on."""
    model = converted(donor_model(heads=4, kv_heads=4), DHASettings(0.25, fusion="trained"))
    fusion.prepare(model, 2)
    fusion.FusingStudent(model, 320).end_step(0.3)
    return model


def students() -> Iterator[Any]:
    donor = donor_model()
    yield pytest.param(fusing, id="fusing")
    yield pytest.param(lambda: converted(donor, MLASettings(kv_budget=0.4, kv_bits="16")), id="mla")
    yield pytest.param(lambda: converted(donor, MLASettings(kv_budget=0.2)), id="coded")
    yield pytest.param(lambda: converted(donor, DHASettings(0.5)), id="dha")
    yield pytest.param(lambda: converted(donor, MoHSettings(active=0.5)), id="moh")
    yield pytest.param(lambda: choose_trained(donor_model(), "hydra", 4), id="hydra")


@pytest.mark.parametrize("make", students())
def test_a_student_of_every_method_writes_what_it_predicts_and_learns_from_it(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most likely token after the whole text, read without a cache, wherever two are not as good as equal."""
    model = make()
    monkeypatch.setattr(token_rows, "random_ids", lambda likely, _: likely.argmax(-1, keepdim=True))
    monkeypatch.setattr(on_policy, "loops", lambda _: False)
    own, text = writer(model.train(), steps=plan(steps=4)), heal_text()
    lenders = text_of(text.order, own.own)
    own.begin(0, text, lenders, ignore)
    assert list(own.rows) == [1]
    model.eval()
    ids = own.rows[1].long()
    words = LENGTH // 4
    assert ids[:words].tolist() == text.train.ids[lenders[1]][:words].tolist()
    with torch.no_grad():
        predicted = model(input_ids=ids[None], use_cache=False).logits[0, words - 1 : -1]
    chosen = predicted.gather(1, ids[words:, None])[:, 0]
    assert (predicted.amax(-1) - chosen).max() < 1e-3
    mixed = own.put_in(text.train[lenders[:2]], torch.arange(2))
    assert mixed.by_student is not None
    assert mixed.by_student.tolist() == [False, True]
    assert mixed.ids[0].tolist() == text.train.ids[0].tolist()
    assert mixed.ids[1].tolist() == ids.tolist()
    found = Student(model.train(), 320)(mixed, Teacher(donor_model(seed=1)), Weights(kl=1.0, beta=0.5))
    found["loss"].backward()
    assert found["own"] > 0
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_rounds_are_written_by_the_student_as_it_is_then() -> None:
    student, _ = pair()
    own, text = writer(student, steps=plan(steps=16)), heal_text(64)
    lenders = text_of(text.order, own.own)
    assert own.every == 4
    own.begin(0, text, lenders, ignore)
    first = dict(own.rows)
    assert list(first) == [1, 3, 5, 7]
    own.begin(3, text, lenders, ignore)
    assert own.rows == first
    again = writer(student, steps=plan(steps=16))
    again.begin(0, text, lenders, ignore)
    assert all(torch.equal(again.rows[number], ids) for number, ids in first.items())
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(-1)
    again.begin(0, text, lenders, ignore)
    assert not any(torch.equal(again.rows[number], ids) for number, ids in first.items())
    own.begin(4, text, lenders, ignore)
    assert list(own.rows) == [9, 11, 13, 15]


def test_no_token_is_written_that_the_teacher_does_not_have() -> None:
    student, _ = pair()
    student.resize_token_embeddings(4000, mean_resizing=False)
    own, text = writer(student), heal_text()
    own.begin(0, text, text_of(text.order, own.own), ignore)
    assert own.rows
    assert all(ids.max() < 320 for ids in own.rows.values())


def say(own: OwnText, monkeypatch: pytest.MonkeyPatch, *texts: list[int]) -> None:
    """Make the student write these texts in turn."""
    turn = iter(texts)

    def continued(_: Any, begun: list[list[int]], length: int, *__: Any, **___: Any) -> Iterator[Tensor]:
        yield torch.tensor([(words + next(turn) * length)[:length] for words in begun])

    monkeypatch.setattr(on_policy, "continued", continued)


def test_text_that_is_empty_or_loops_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = pair()
    own, text = writer(student, steps=plan(steps=16)), heal_text(64)
    lenders = text_of(text.order, own.own)
    space = make_tokenizer()(" ", add_special_tokens=False)["input_ids"]
    say(own, monkeypatch, list(range(100, 130)), [1], [90, 91], space)
    own.begin(0, text, lenders, ignore)
    assert (list(own.rows), own.faults) == ([1], {3: "empty", 5: "loops", 7: "empty"})
    assert own.facts(0) == {"own_rows": 1, "own_empty": 0, "own_loops": 0}
    assert own.facts(1) == {"own_rows": 0, "own_empty": 1, "own_loops": 0}
    rest = own.put_in(text.train[lenders[2:4]], torch.arange(2, 4))
    assert torch.equal(rest.ids, text.train.ids[lenders[2:4]])
    assert rest.by_student is not None
    assert not rest.by_student.any()
    say(own, monkeypatch, *[[90]] * 4)
    message = (
        r"7 of 8 texts that the student wrote are dropped \(2 empty, 5 in loops\); .* without --on-policy"
    )
    with pytest.raises(HealError, match=message):
        own.begin(4, text, lenders, ignore)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("converted") / "ckpt")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [TEXT[start : start + 200] for start in range(0, 250, 2)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return file


def test_a_run_that_was_cut_in_a_round_goes_on_to_the_bit(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """The round that it was in is kept, and the later ones are written by the same student."""
    small = {"sequence_length": 32, "batch_tokens": 128, "held_out": 2, "micro_batch": 2, "epochs": 9}
    sizes = {"tokens": 128 * 12, "save_tokens": 128 * 4}
    settings = HealSettings(data={str(text): 1}, on_policy=0.5, on_policy_loss=0.5, **sizes, **small)
    whole = api.heal(str(checkpoint), settings, output=str(tmp_path / "whole"), verify=False)

    def cut(event: Progress) -> None:
        if event.stage == "heal" and event.done == 128 * 6:
            raise KeyboardInterrupt

    place = str(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        api.heal(str(checkpoint), settings, output=place, verify=False, on_progress=cut)
    [saved] = (tmp_path / "cut.partial" / "work").glob("step-*")
    assert saved.name == "step-00000004"  # of rounds of three steps
    assert {int(name) // 12 for name in load_file(saved / on_policy.FILE)} == {1}
    report = api.heal(str(checkpoint), settings, output=place, verify=False, resume=True)
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    entries = [entry for entry in read(tmp_path / "cut" / "metrics.jsonl") if "own" in entry]
    assert len(entries) == 12
    told = report["healing"]["own_texts"]
    assert told == whole["healing"]["own_texts"]
    assert told["rows"] + told["empty"] + told["loops"] == 24
    assert report["healing"]["predictions"] == sum(int(entry["predictions"]) for entry in entries)
    assert "texts of its own" in (tmp_path / "cut" / "README.md").read_text(encoding="utf-8")


def test_the_rounds_stay_as_they_are_with_other_processes(tmp_path: Path) -> None:
    student, steps = Student(pair()[0], 320), plan(steps=200)
    own = written(steps, 0.5)

    def begun(processes: int, saved: Path | None) -> OwnText:
        accelerator: Any = SimpleNamespace(num_processes=processes)
        return OwnText(accelerator, student, make_tokenizer(), steps, own, 0, saved)

    one = begun(1, None)
    one.save(tmp_path)
    assert begun(4, None).every > one.every
    assert begun(4, tmp_path).every == one.every


def test_only_as_many_rows_of_text_are_needed_as_are_read(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    sizes = {"sequence_length": 32, "batch_tokens": 128, "held_out": 2, "tokens": 1024}
    settings = HealSettings(data={str(text): 1}, on_policy=0.75, **sizes)
    report = api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert report["healing"]["text_tokens"] == {str(text): 8 * 32}


def test_a_share_below_one_row_is_refused_before_weights_are_read(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_model.OpenModel, "model", None)
    sizes = {"sequence_length": 32, "batch_tokens": 64, "held_out": 2, "tokens": 64 * 25}
    settings = HealSettings(data={str(text): 1}, on_policy=0.01, **sizes)
    with pytest.raises(HealError, match=r"on_policy=0.01 of the 50 rows .* at least 1/50, or more --tokens"):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert list(tmp_path.iterdir()) == []
    assert written(plan(steps=25), 1 / 50).sum() == 1
    with pytest.raises(HealError, match="of the 48 rows"):
        written(plan(steps=25, lm_from=24), 1 / 50)


def test_a_divided_student_writes_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_models, "DistributedType", SimpleNamespace(FSDP=DistributedType.NO))
    settings = HealSettings(tokens=256, data={str(text): 1}, on_policy=0.5)
    with pytest.raises(HealError, match="FSDP divides: use one process or DDP for on_policy"):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert list(tmp_path.iterdir()) == []
