"""A byte-level BPE tokenizer as GGUF metadata, with llama.cpp's name of its pre-tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers

from mhconvert.errors import ExportError

from ...donor.gguf_pre_tokenizers import PRE_TOKENIZERS
from ...donor.tokenizer_files import load_tokenizer
from ...storage.safetensors_reader import read_json

MORE_ENDS = ("eot", "eom")  # llama.cpp ends an answer at these too
BYTES_A_PIECE = 64  # disk space reserved for each token and each merge


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer in a GGUF file.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, kinds: of each id.
        merges: of the BPE, each as two words.
        ids: of "bos", "eos", "unk", "pad", "eot" and "eom", where there are such tokens; the last two are further ends
            of an answer.
        starts, ends: whether text gets a bos, and an eos.
        template: the chat template, or several as {"name", "template"}.
        skipped: steps of the tokenizer that llama.cpp does not have.
    """

    pre: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str]
    ids: dict[str, int]
    starts: bool
    ends: bool
    template: str | list[dict[str, str]] | None
    skipped: list[str]

    @property
    def nbytes(self) -> int:
        """An upper bound of its size in a file, in bytes."""
        template = len(json.dumps(self.template))
        return BYTES_A_PIECE * (len(self.tokens) + len(self.merges)) + template

    def add_to(self, writer: GGUFWriter) -> None:
        """Add it to the file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        for name, index in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.starts)
        writer.add_add_eos_token(self.ends)
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, vocab_size: int, trusted: bool = False) -> Vocabulary:
    """The tokenizer of `folder`, padded to the model's vocab_size tokens; `trusted`: its own code may run.

    Raises:
        ExportError: where there is none, or llama.cpp would split the same text into other tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder} has no tokenizer.json, and a GGUF file holds its tokenizer")
    tokenizer = load_tokenizer(folder, trusted)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer = content["model"], (content["normalizer"] or {}).get("type")
    refusals = {
        f"it is {model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}; byte-level BPE alone is "
        "written": model["type"] != "BPE" or bool(model.get("byte_fallback")),
        f"it normalises text by {normalizer}": normalizer not in (None, "NFC"),
        "its pieces have a prefix or suffix": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
        f"it has {len(tokenizer)} tokens and the model {vocab_size}": len(tokenizer) > vocab_size,
    }
    reason = next((reason for reason, holds in refusals.items() if holds), None)
    if reason is not None:
        raise ExportError(f"llama.cpp cannot hold the tokenizer of {folder}: {reason}")
    tokens, kinds = _tokens(content, vocab_size)
    starts, ends = _ends(tokenizer, folder)
    named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    more = [end for end in _answer_ends(folder) if end != named["eos"] and end < vocab_size]
    if named["eos"] is None and more:
        named["eos"] = more.pop(0)
    named |= dict(zip(MORE_ENDS, more, strict=False))
    return Vocabulary(
        pre=_pre_tokenizer(content, folder),
        tokens=tokens,
        kinds=kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        ids={name: index for name, index in named.items() if index is not None},
        starts=starts,
        ends=ends,
        template=_template(tokenizer.chat_template),
        skipped=[*_skipped(content), *(f"that token {end} ends an answer" for end in more[len(MORE_ENDS) :])],
    )


def _answer_ends(folder: Path) -> list[int]:
    """The eos ids of the model, by its generation settings or else its config."""
    for name in ("generation_config.json", "config.json"):
        stated = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        if stated is not None:
            return [int(end) for end in (stated if isinstance(stated, list) else [stated])]
    return []


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in content["model"]["vocab"].items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, kinds


def _pre_tokenizer(content: dict[str, Any], folder: Path) -> str:
    ours, ignores = _steps(content["pre_tokenizer"]), bool(content["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        state = json.loads(pre_tokenizers.Sequence(known.steps).__getstate__())
        if (ours, ignores) == (_steps(state), known.ignore_merges):
            return name
    names = ", ".join(PRE_TOKENIZERS)
    shown = " then ".join(" ".join(step) for step in ours) or "nothing"
    raise ExportError(
        f"the tokenizer of {folder} cuts text by {shown} (ignore_merges={ignores}), which is none of llama.cpp's "
        f"pre-tokenizers that are known here: {names}"
    )


def _steps(state: dict[str, Any] | None) -> list[tuple[str, ...]]:
    """What of a pre-tokenizer decides where text is cut. A Split that removes what lies between its matches does what
    one does that isolates them, where the matches leave nothing out, as those of PRE_TOKENIZERS do."""
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [step for part in state["pretokenizers"] for step in _steps(part)]
    if state["type"] == "Split":
        how = (state["behavior"], state["invert"])
        plain = how in (("Isolated", False), ("Removed", True))
        return [("Split", *state["pattern"].values(), *(() if plain else map(str, how)))]
    if state["type"] == "ByteLevel":
        return [
            (
                "ByteLevel",
                f"use_regex={state['use_regex']}",
                *(["prefix"] if state["add_prefix_space"] else []),
            )
        ]
    return [(state["type"], *(f"{key}={value}" for key, value in state.items() if key != "type"))]


def _ends(tokenizer: Any, folder: Path) -> tuple[bool, bool]:
    """Whether text starts with bos and ends with eos."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for starts in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * starts + bare + [tokenizer.eos_token_id] * ends:
                return starts, ends
    raise ExportError(f"the tokenizer of {folder} adds tokens other than bos and eos to a text: {whole}")


def _template(template: str | dict[str, str] | None) -> str | list[dict[str, str]] | None:
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template


def _skipped(content: dict[str, Any]) -> list[str]:
    skipped = ["NFC normalisation of text"] if content["normalizer"] else []
    for added in content["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            skipped.append(f"what {added['content']} does to the text around it")
    return skipped
