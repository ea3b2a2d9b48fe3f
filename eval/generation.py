"""Text from a model, and the bytes in the cache that it filled while writing it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from mhconvert.errors import MhconvertError

from ..convert.bare_process.child import cache_storage
from ..convert.open_model import OpenModel


@dataclass(frozen=True)
class Options:
    """temperature 0: greedy. seed: of the sampling. chat: the prompt is one user message."""

    max_new_tokens: int = 64
    chat: bool = False
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MhconvertError(f"--max-new-tokens {self.max_new_tokens} generates nothing; use at least 1")
        if not 0 <= self.temperature < math.inf:
            raise MhconvertError(
                f"--temperature {self.temperature} is not between 0, which is greedy, and infinity"
            )
        if not 0 <= self.seed < 2**32:
            raise MhconvertError(f"--seed {self.seed} is not between 0 and {2**32 - 1}")


class _Listening(TextStreamer):
    """Hands finished text to a function; the prompt is not repeated."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def generate(
    opened: OpenModel, prompt: str, options: Options, on_text: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """See `mhconvert.api.generate`."""
    tokenizer = opened.tokenizer()
    encoded = _encode(tokenizer, prompt, options.chat)
    if encoded["input_ids"].shape[1] == 0:
        raise MhconvertError("the prompt has no tokens; give some text")
    opened.require_length(encoded["input_ids"].shape[1] + options.max_new_tokens)
    model = opened.model()
    if on_text is not None and not options.chat:
        on_text(prompt)
    started = time.perf_counter()
    output = _run(model, encoded, options, _Listening(tokenizer, on_text) if on_text else None)
    written = output.sequences[0, encoded["input_ids"].shape[1] :]
    cache = output.past_key_values
    return {
        "prompt": prompt,
        "text": tokenizer.decode(written, skip_special_tokens=True),
        "prompt_tokens": encoded["input_ids"].shape[1],
        "new_tokens": len(written),
        "kv_bytes_per_token": cache_storage(cache)[0] / int(cache.get_seq_length()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": time.perf_counter() - started,
    }


def _encode(tokenizer: Any, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    if chat and not tokenizer.chat_template:
        raise MhconvertError(
            "this model has no chat template; leave --chat away to continue the prompt as text"
        )
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _run(model: Any, encoded: dict[str, torch.Tensor], options: Options, streamer: Any) -> Any:
    sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    torch.manual_seed(options.seed)
    with torch.inference_mode():
        return model.generate(
            **{name: tensor.to(model.device) for name, tensor in encoded.items()},
            **(sampling if options.temperature > 0 else greedy),
            max_new_tokens=options.max_new_tokens,
            return_dict_in_generate=True,
            streamer=streamer,
        )
