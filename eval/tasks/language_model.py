"""lm-eval's wrapper of a model: in this process with transformers, or in vLLM's."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import MhconvertError

from ...convert.bare_process.known_code import may_run_code
from ..settings import OWN_CACHE
from ..vllm.engine import Engine, loadable
from .candidate import Candidate
from .chat_template import answer_ends

DEFAULT_LENGTH = 2048  # tokens that a model reads whose config does not say it


def language_model(candidate: Candidate) -> Any:
    """lm-eval's wrapper of the model, made when it is first needed.

    Raises:
        MhconvertError: there is no chat template, or vLLM does not load the model.
    """
    if candidate.lm is None:
        opened, tokenizer = candidate.opened, candidate.opened.tokenizer()
        if candidate.settings.chat_template and not getattr(tokenizer, "chat_template", None):
            raise MhconvertError(f"{opened.reference} has no chat template; give --no-chat-template")
        make = _in_vllm if candidate.settings.backend == "vllm" else _in_transformers
        candidate.lm = make(candidate, tokenizer)
    return candidate.lm


def _in_transformers(candidate: Candidate, tokenizer: Any) -> Any:
    from ..writing.continuations import end_tokens
    from .progress_model import ProgressLM

    model, settings = candidate.load(candidate.dtype), candidate.settings
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    of_template = answer_ends(tokenizer) if settings.chat_template else []
    return ProgressLM(model, tokenizer, settings.max_length, [*end_tokens(model), *own, *of_template])


def _in_vllm(candidate: Candidate, tokenizer: Any) -> Any:
    from .vllm_model import VllmLM

    opened, settings = candidate.opened, candidate.settings
    config = opened.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
    if settings.max_length is not None:
        # Two more: the token that the last one predicts, and one that vLLM makes.
        length = min(length, settings.max_length + 2)
    own_cache = candidate.kv_cache_dtype == OWN_CACHE
    folder = loadable(opened)
    engine = Engine(
        folder,
        python=settings.python,
        dtype=str(candidate.dtype).removeprefix("torch."),
        trust_remote_code=may_run_code(folder, opened.trust_remote_code),
        max_model_len=length,
        **({} if own_cache else {"kv_cache_dtype": candidate.kv_cache_dtype}),
    )
    return VllmLM(engine, tokenizer, config, length - 1)
