"""One folder in vLLM beside transformers: how far apart they are, and what cache vLLM plans."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhconvert.eval.vllm.engine import Engine
from tests.engines.exported_forms import NEW_TOKENS, in_transformers

PYTHON = os.environ.get("MHCONVERT_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="MHCONVERT_VLLM_PYTHON names no Python that has vllm")

FLOAT32 = 4  # bytes of an element
BFLOAT16 = (
    1.5  # times the donor's loss that an export in bfloat16 may have: it rounds once more, in the latent
)


@dataclass(frozen=True)
class Compared:
    """difference: the largest of log-probabilities; greedy_equal: whether texts are; about: the engine."""

    difference: float
    greedy_equal: bool
    about: dict[str, Any]


def compare(folder: Path, rows: list[list[int]], dtype: str = "float32") -> Compared:
    """`folder` in vLLM in `dtype`, and in transformers in float32."""
    expected, texts = in_transformers(folder, rows)
    with Engine(folder, python=PYTHON, dtype=dtype, max_model_len=512, trust_remote_code=True) as engine:
        found = engine.score(rows)
        made = engine.generate(rows, {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True})
        return Compared(worst(found, expected), [row["tokens"] for row in made] == texts, engine.about)


def worst(found: list[dict[str, Any]], expected: list[Tensor]) -> float:
    """The largest difference of log-probabilities."""
    pairs = zip(found, expected, strict=True)
    return max((torch.tensor(row["logprobs"]) - scores).abs().max().item() for row, scores in pairs)
