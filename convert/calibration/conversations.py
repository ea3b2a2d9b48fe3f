"""The conversation of a record, in the forms that training sets have, as messages for a chat template."""

from __future__ import annotations

from typing import Any

from mhconvert.errors import TextError

Messages = list[dict[str, Any]]

FIELDS = (
    "text",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
)  # those that are read
# Who speaks in ShareGPT's form -> the role in a chat template.
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def is_record(value: Any) -> bool:
    """Whether a JSON value has the fields of a document: a text or a conversation."""
    return isinstance(value, dict) and ("text" in value or conversation_field(value) is not None)


def conversation_field(record: dict[str, Any]) -> str | None:
    """The field that makes the record a conversation; None if there is none."""
    for name in ("messages", "conversations"):
        if record.get(name) is not None:
            return name
    return "instruction" if record.get("instruction") is not None and "output" in record else None


def messages_of(record: dict[str, Any]) -> Messages:
    """The messages of a record that has a conversation, each with a role and its text or other content.

    messages: [{role, content}]. conversations: ShareGPT's [{from, value}], or messages under that name; `system`
    comes first where the record has it. instruction, input, output: Alpaca's question and answer.

    Raises:
        TextError: the conversation is not of the form that its field names, or a message has no content.
    """
    field = conversation_field(record)
    if field == "instruction":
        return _alpaca(record)
    turns = record[field or "messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise TextError(f"its '{field}' is not a list of messages")
    if field == "conversations":
        turns = _system(record) + [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    return _cleaned(turns)


def _alpaca(record: dict[str, Any]) -> Messages:
    instruction, context, answer = record["instruction"], record.get("input") or "", record["output"]
    if not all(isinstance(part, str) for part in (instruction, context, answer)):
        raise TextError("its 'instruction', 'input' and 'output' are not all text")
    question = f"{instruction}\n\n{context}" if context else instruction
    return [*_system(record), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(record: dict[str, Any]) -> Messages:
    text = record.get("system")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text else []


def _turn(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """A turn of ShareGPT's form as a message; one that is a message already as it is."""
    if turn.get("role") is not None:
        return turn
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker.lower() not in ROLES:
        raise TextError(f"message {number} is from {speaker!r}, not from one of {', '.join(ROLES)}")
    return {"role": ROLES[speaker.lower()], "content": value}


def _cleaned(turns: Messages) -> Messages:
    """Messages without empty fields, with plain text for contents that are lists of texts.

    Templates of text models print a list or a null as Python does.
    """
    messages = [{name: value for name, value in message.items() if value is not None} for message in turns]
    for number, message in enumerate(messages, start=1):
        if isinstance(content := message.get("content"), list):
            message["content"] = "\n".join(_part(part, number) for part in content)
        elif not message.keys() - {"role", "name"}:
            raise TextError(f"message {number} has no content")
    return messages


def _part(part: Any, number: int) -> str:
    """The text of a part of message `number`; raises TextError for an image or another medium."""
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    raise TextError(f"message {number} has a part that is not text ({kind or type(part).__name__})")
