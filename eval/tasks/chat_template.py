"""Questions in a model's chat template: whether they are, what refuses them, and which tokens end an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhconvert.errors import MhconvertError

from ...convert.open_model import OpenModel
from ..settings import EvalSettings
from .task_choice import suites

ANSWER = "mhconvert"  # a word that templates do not write themselves


def asked_through(settings: EvalSettings, donor: OpenModel) -> bool:
    """Whether tasks are asked through the chat template: as the settings say, or else in a suite that wants it of a
    model that has one, which the donor decides for all."""
    if settings.chat_template is not None:
        return settings.chat_template
    wanted = settings.suite is not None and suites()[settings.suite].get("chat_template", False)
    return bool(wanted and getattr(donor.tokenizer(), "chat_template", None))


def in_template(apply: Callable[..., Any], messages: Any, add_generation_prompt: bool) -> Any:
    """What `apply` makes of the messages. Raises MhconvertError with the reason where the template refuses them."""
    try:
        return apply(messages, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program, which raises errors of many classes
        reason = " ".join(str(error).split())
        raise MhconvertError(
            f"the chat template refuses a question of the task: {reason}; ask without it by --no-chat-template"
        ) from error


def answer_ends(tokenizer: Any) -> list[int]:
    """The special token that the chat template writes after an answer; [] where there is none."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # what it refuses here is told when it is asked
        return []
    after = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    return [token for token in after if token in tokenizer.all_special_ids][:1]
