"""lm-eval's wrapper of a transformers model in memory, with progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from mhconvert.errors import MhconvertError

from ...convert.calibration.token_rows import require_embedded
from .chat_template import in_template
from .prompt_middle import without_middle


def prefix_token(tokenizer: Any, config: Any) -> int:
    """The token that stands before a text: begin or end of text, by tokenizer or config, or else a line break.

    Raises:
        MhconvertError: there is none with a row in the model's embedding.
    """
    ends = [value for of in (tokenizer, config) for value in (of.bos_token_id, of.eos_token_id)]
    first = [value[0] if isinstance(value, list) else value for value in ends if value not in (None, [])]
    for token in (*first, *tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]):
        if 0 <= token < config.vocab_size:
            return int(token)
    raise MhconvertError(
        "lm-eval puts a token before a text, and this tokenizer has none for it: neither bos nor eos nor a line break; "
        'name one in tokenizer_config.json, for example "bos_token"'
    )


class ProgressLM(HFLM):
    """An `HFLM` that reports the rows of the current task; under `accelerate launch` it runs on several GPUs.

    `simple_evaluate` splits the documents over the processes by `rank` and `world_size`, as for models that lm-eval
    loads itself.

    Attributes:
        on_rows: called with the rows done and the rows of the task after each call of the model.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_length: int | None = None, ends: Sequence[int] = ()
    ) -> None:
        """ends: the tokens that end a text; without any, texts are as long as a task lets them be."""
        config = model.config.get_text_config()
        prefix = prefix_token(tokenizer, config)
        self._rows = config.vocab_size
        pad = tokenizer.pad_token_id
        if pad is None or pad >= self._rows:  # lm-eval would add a token, which the model cannot read
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(prefix)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, prefix_token_id=prefix)
        self.on_rows: Callable[[int, int], None] = lambda done, total: None
        self._done, self._total, self._counted = 0, 0, False
        self._ends = sorted({int(token) for token in ends if 0 <= token < self._rows})
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total, self._counted = 0, 0, False
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self._done, self._counted = 0, True
        self._total = sum(-(-length // self.max_length) for length in lengths)  # windows without overlap
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        if not self._counted:
            self._total += len(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def room(self, asked: dict[str, Any]) -> int:
        """Tokens of a prompt that fit beside the new ones that a task asks for; 0 or less: none."""
        new: int = normalize_gen_kwargs(asked, self.max_gen_toks)["max_gen_toks"]
        return int(self.max_length) - new

    def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> Any:
        return in_template(super().apply_chat_template, chat_history, add_generation_prompt)

    def tok_batch_encode(
        self,
        strings: Any,
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """As of HFLM, but a prompt that does not fit lacks its middle, not its beginning."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if not left_truncate_len or ids.shape[1] <= left_truncate_len:
            return ids, mask
        return without_middle(ids, mask, left_truncate_len)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """As of HFLM, up to the first token that ends a text; None for the end-of-text token of a tokenizer that has
        none."""
        if tokens is None:
            return None
        if skip_special_tokens and isinstance(tokens, list):
            tokens = list(takewhile(lambda token: token not in self._ends, tokens))
        return super().tok_decode(tokens, skip_special_tokens)

    def _model_generate(self, context: Any, *arguments: Any, **options: Any) -> Any:
        require_embedded(context, self.tokenizer, self._rows)
        output = super()._model_generate(context, *arguments, eos_token_id=self._ends or None, **options)
        self._done += len(context)
        self.on_rows(min(self._done, self._total), self._total)
        return output

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        require_embedded(inps, self.tokenizer, self._rows)
        logits = super()._model_call(inps, attn_mask, labels)
        self._done += len(inps)
        self.on_rows(min(self._done, self._total), self._total)
        return logits
