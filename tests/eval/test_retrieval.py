"""The retrieval probe: what looks the needle up finds it, what cannot does not, and every model reads the same."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhconvert.errors import MhconvertError, RecipeError
from mhconvert.eval.needle_text import Case, make_case
from mhconvert.eval.retrieval import measure, probe, usable_lengths
from mhconvert.eval.settings import EvalSettings
from tests.donors import make_config, make_model, make_tokenizer

CERTAIN = 30.0  # a logit among zeros: the others together have 300 · e^−30 of the probability


class Lookup(torch.nn.Module):
    """Predicts the token that followed the longest earlier match of what it has read: recall without weights."""

    def __init__(self, limit: int = 8192) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=limit))
        self.read: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        ids = input_ids[0].tolist()
        self.read.append(ids)
        logits = torch.zeros(1, len(ids), 320)
        for last in range(len(ids) - 12, len(ids)):
            before = range(1, last + 1)
            match = max(before, key=lambda end: self._matching(ids, end, last + 1), default=0)
            logits[0, last, ids[match]] = CERTAIN
        return SimpleNamespace(logits=logits)

    def _matching(self, ids: list[int], end: int, stop: int) -> int:
        """Tokens that the text before `end` has in common with the text before `stop`, from the back."""
        length = 0
        while length < end and end < stop and ids[end - 1 - length] == ids[stop - 1 - length]:
            length += 1
        return length


class Kept(torch.nn.Module):
    """A real model, counting the positions that it made logits of."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, torch.device("cpu")
        self.kept: list[int] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        output = self.model(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        self.kept.append(output.logits.shape[1])
        return output


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def test_a_model_that_looks_up_recalls_every_needle(tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    result = probe(
        Lookup(),
        tokenizer,
        lengths=(300, 500),
        depths=(0, 0.5, 1),
        trials=2,
        on_cell=lambda *at: seen.append(at),
    )
    assert result["recalled"] == [[1.0] * 3] * 2
    assert result["share"] == 1
    assert result["mean_nll"] < 1e-9
    assert seen == [(n, 6) for n in range(1, 7)]
    assert result["cells"] == 6
    assert (result["lengths"], result["depths"], result["trials"]) == ([300, 500], [0, 0.5, 1], 2)
    assert [len(row) for row in result["nll"]] == [3, 3]


def test_a_needle_that_is_not_there_is_not_recalled(tokenizer: Any) -> None:
    result = probe(Lookup(), tokenizer, lengths=(300,), depths=(0.5,), trials=4)
    assert result["recalled"] == [[1.0]]
    assert result["absent"]["recalled"] == 0
    assert result["absent"]["nll"] > 5
    case = make_case(tokenizer, 300, 0.5, planted=False)
    answer = tokenizer.decode(case.ids[-case.answer :])
    assert tokenizer.decode(case.ids).count(answer) == 1  # the answer itself


def test_a_random_model_recalls_nothing(tokenizer: Any) -> None:
    model = Kept(make_model(make_config()))
    result = probe(model, tokenizer, lengths=(300,), depths=(0, 1), trials=3)
    assert result["recalled"] == [[0.0, 0.0]]
    assert result["share"] == 0
    assert 0 < result["share_stderr"] < 0.3  # 0 of 6 is no certainty
    assert result["mean_nll"] > 1
    assert max(model.kept) < 12  # of the answer alone


def test_an_adapter_without_effect_is_measured_as_its_base_model(tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"lengths": (300,), "depths": (0.5,)}
    base = probe(make_model(make_config()), tokenizer, **options)
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(make_model(make_config()), settings).eval()
    assert probe(adapted, tokenizer, **options) == base


def test_kept_logits_and_greedy_decoding_agree(tokenizer: Any) -> None:
    """Teacher forcing and slicing, with the model's own greedy continuation as the judge, right and wrong."""
    model = make_model(make_config())
    prompt = make_case(tokenizer, 300, 0.5).ids[:-8]
    inputs = torch.tensor([prompt])
    with torch.inference_mode():
        greedy = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )[0].tolist()
        scores = model(input_ids=torch.tensor([greedy])).logits[0, -7:-1].log_softmax(-1)
    recalled, nll = measure(model, Case(tuple(greedy), 6))
    assert recalled
    expected = -scores.gather(1, torch.tensor(greedy[-6:])[:, None]).mean().item()
    assert nll == pytest.approx(expected, rel=1e-5)  # float32, 2 layers
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 320]
    assert not measure(model, Case(tuple(wrong), 6))[0]
    assert not measure(model, Case((*greedy[:-6], (greedy[-6] + 1) % 320, *greedy[-5:]), 6))[0]


@pytest.mark.parametrize("length", [200, 333, 512])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_case_fills_its_length_and_has_the_needle_at_its_depth(
    tokenizer: Any, length: int, depth: float
) -> None:
    case = make_case(tokenizer, length, depth)
    assert length - 100 < len(case.ids) <= length
    text = tokenizer.decode(case.ids)
    answer = tokenizer.decode(case.ids[-case.answer :])
    assert answer.strip().isdigit()
    assert len(answer.strip()) == 7
    assert text.count(answer.strip()) == 2
    sentences = text.split(".")
    place = next(index for index, part in enumerate(sentences) if answer in part)
    assert place == round(depth * (len(sentences) - 2))


def test_cases_are_the_same_again_and_differ_by_cell(tokenizer: Any) -> None:
    first = make_case(tokenizer, 300, 0.5)
    assert first == make_case(make_tokenizer(), 300, 0.5)
    others = [make_case(tokenizer, 300, 0.5, seed=1), make_case(tokenizer, 300, 0.5, trial=1)]
    assert all(first.ids != other.ids for other in others)
    left, right = Lookup(), Lookup()
    for model in (left, right):
        probe(model, tokenizer, lengths=(300,), depths=(0, 1))
    assert left.read == right.read


def test_a_beginning_that_the_tokenizer_puts_is_kept_and_an_end_is_not() -> None:
    from tokenizers.processors import TemplateProcessing

    plain, closed = make_tokenizer(), make_tokenizer()
    ids = {name: closed.convert_tokens_to_ids(name) for name in ("<|bos|>", "<|eos|>")}
    closed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|eos|>", special_tokens=list(ids.items())
    )
    assert closed("a")["input_ids"][-1] == ids["<|eos|>"]
    case = make_case(closed, 300, 0.5)
    assert case.ids[0] == ids["<|bos|>"]
    assert ids["<|eos|>"] not in case.ids
    assert len(case.ids) <= 300
    assert make_case(plain, 300, 0.5).ids[0] != ids["<|bos|>"]


def test_lengths_beyond_the_model() -> None:
    assert usable_lengths(512, (256, 512, 1024)) == ([256, 512], [1024])
    assert usable_lengths(None, (256, 1024)) == ([256, 1024], [])
    with pytest.raises(MhconvertError, match="reads at most 512 tokens and a length of 1024 is asked for"):
        probe(Lookup(512), make_tokenizer(), lengths=(256, 1024))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"lengths": (20,)}, "a length of 20 tokens does not hold needle and question, which take"),
        ({"depths": (0.5, 1.5)}, "depths 0.5, 1.5 are not all between"),
        ({"trials": 0}, "0 trials make no probe"),
        ({"lengths": ()}, "0 lengths"),
        ({"depths": ()}, "0 depths"),
    ],
)
def test_what_makes_no_probe_is_refused(tokenizer: Any, options: dict[str, Any], fault: str) -> None:
    with pytest.raises(MhconvertError, match=fault):
        probe(Lookup(), tokenizer, **({"lengths": (300,)} | options))


def test_the_standard_error_narrows_with_trials(tokenizer: Any) -> None:
    model = Lookup()
    few, many = (
        probe(model, tokenizer, lengths=(200,), depths=(0.5,), trials=n)["share_stderr"] for n in (2, 12)
    )
    assert few > many > 0
    assert math.isfinite(few)


def test_depths_are_read_from_text_and_lists() -> None:
    assert EvalSettings(retrieval=True, retrieval_depths="0,.1,.9").retrieval_depths == (0, 0.1, 0.9)
    assert EvalSettings(retrieval=True, retrieval_depths=[0, 1]).retrieval_depths == (0, 1)
    with pytest.raises(RecipeError, match="'0,2' is not a list of different depths from 0"):
        EvalSettings(retrieval=True, retrieval_depths="0,2")
    for depths in ([2.0], [], [math.nan], [0.5, 0.5]):
        with pytest.raises(RecipeError, match="is not a list of different depths"):
            EvalSettings(retrieval=True, retrieval_depths=depths)
    with pytest.raises(RecipeError, match="_depths and _trials are of retrieval"):
        EvalSettings(text="a.txt", retrieval_depths="0.5")


def test_lengths_are_different_numbers_above_none() -> None:
    """A length twice would be counted as other trials, and is the same texts."""
    assert EvalSettings(retrieval=True, retrieval_lengths="512,256").retrieval_lengths == (512, 256)
    for lengths in ((0,), (), [512, 512], "512,512", "512,", "-3"):
        with pytest.raises(
            RecipeError, match="is not a list of different numbers of tokens, such as 512,1024"
        ):
            EvalSettings(retrieval=True, retrieval_lengths=lengths)
