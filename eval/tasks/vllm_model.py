"""lm-eval's view of a model in vLLM: it makes rows of token ids, and `Engine` scores or continues them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mhconvert.errors import MhconvertError

from ..vllm.engine import Engine
from .chat_template import in_template
from .progress_model import prefix_token
from .prompt_middle import ends_of

ROWS = 64  # in one request; vLLM makes batches of them, and progress is told between requests
NEW_TOKENS = 256  # where a task does not say


class VllmLM(TemplateLM):
    """A model in vLLM.

    Attributes:
        on_rows: called with the rows done and the rows of the call after each request.
    """

    def __init__(self, engine: Engine, tokenizer: Any, config: Any, row_tokens: int) -> None:
        """
        Args:
            config: of the text model.
            row_tokens: tokens of a scored row at most, one more than those that predict; vLLM makes one after them.
        """
        super().__init__()
        self.engine, self.tokenizer = engine, tokenizer
        self._prefix, self._row_tokens = prefix_token(tokenizer, config), row_tokens
        self.on_rows: Callable[[int, int], None] = lambda done, total: None

    @property
    def eot_token_id(self) -> Any:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids as lm-eval makes them for transformers: with the tokenizer's own first token, once."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self._prefix))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    def room(self, asked: dict[str, Any]) -> int:
        """Tokens of a prompt that fit beside the new ones that a task asks for; 0 or less: none."""
        return self._row_tokens - 1 - int(_sampling(asked, None)["max_tokens"])

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> Any:
        apply = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            continue_final_message=not add_generation_prompt,
        )
        return in_template(apply, chat_history, add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-self._row_tokens :] for _, context, continuation in requests]
        answers = []
        for (key, _, continuation), scored in zip(
            requests, self._in_parts(rows, self.engine.score), strict=True
        ):
            begin = len(scored["logprobs"]) - len(continuation)
            if begin < 0:
                raise MhconvertError(
                    f"a text of {len(continuation)} tokens is asked for, and rows have {self._row_tokens}; "
                    "give a larger --max-length"
                )
            answer = (math.fsum(scored["logprobs"][begin:]), all(scored["best"][begin:]))
            if math.isnan(answer[0]):
                raise MhconvertError(
                    f"{self.engine.model} gives scores that are NaN in vllm; evaluate it with --dtype float32"
                )
            answers.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        windows, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self._prefix, self._row_tokens - 1, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += parts
            owners += [index] * len(parts)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        end = self.tokenizer.eos_token_id
        sampling = [
            _sampling(request.args[1], None if end is None else self.tokenizer.decode(end))
            for request in requests
        ]
        most = max(each["max_tokens"] for each in sampling)
        if most >= self._row_tokens - 1:
            raise MhconvertError(
                f"a task asks for {most} new tokens, and rows have {self._row_tokens - 1}; give a larger --max-length"
            )
        rows = [ends_of(self.tok_encode(request.args[0]), self.room(request.args[1])) for request in requests]
        made = self._in_parts(list(zip(rows, sampling, strict=True)), self._continue)
        texts = []
        for request, each, row in zip(requests, sampling, made, strict=True):
            texts.append(postprocess_generated_text(row["text"], each["stop"], None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _continue(self, rows: list[tuple[list[int], dict[str, Any]]]) -> list[dict[str, Any]]:
        return self.engine.generate([ids for ids, _ in rows], [sampling for _, sampling in rows])

    def _in_parts(self, rows: list[Any], ask: Callable[[list[Any]], list[Any]]) -> Iterator[Any]:
        """What `ask` answers for each row, with progress; what was answered may be stored before the rest is asked."""
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            yield from ask(part)
            self.on_rows(start + len(part), len(rows))


def _sampling(asked: dict[str, Any], end: str | None) -> dict[str, Any]:
    """vLLM's sampling parameters for what a task asks; greedy unless it asks for samples, which vLLM would take."""
    wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked, default_max_gen_toks=NEW_TOKENS))
    kept = {name: wanted[name] for name in ("temperature", "top_p", "top_k") if name in wanted}
    greedy = {} if wanted.get("do_sample") else {"temperature": 0.0}
    stop = [word for word in handle_stop_sequences(wanted["until"], eos=end) if word]
    return (
        {"max_tokens": int(wanted["max_gen_toks"]), "stop": stop, "skip_special_tokens": False}
        | kept
        | greedy
    )
