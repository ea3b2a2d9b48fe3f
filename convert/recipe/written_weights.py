"""How the dtype of written weights and the size of their files may be said. Imports no torch."""

from __future__ import annotations

from mhconvert.errors import MhconvertError, OutputError

from ..storage.byte_size import byte_size

DTYPES = ("float32", "bfloat16", "float16")
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_name(text: str) -> str:
    """Return "bfloat16" for "bf16" and "torch.bfloat16". Raises MhconvertError for what is not in DTYPES."""
    name = text.removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise MhconvertError(f"dtype '{text}' is not one of {', '.join(DTYPES)}")
    return name


def known_dtype(text: str) -> str:
    """Return the dtype as it is written, so that a recipe keeps its hash. Raises MhconvertError as `dtype_name`."""
    dtype_name(text)
    return text


def shard_size(size: str | float) -> str:
    """Return "1000" for 1000, 1e3 and "1e3", which is text in YAML 1.1; other sizes as they are.

    Raises OutputError for what is no size.
    """
    try:
        whole = isinstance(size, int) or float(size).is_integer()
    except ValueError:
        whole = False
    if isinstance(size, float) and not whole:
        raise OutputError(f"max_shard_size '{size}' is not a size such as 5GB or 500MB")
    written = str(int(float(size))) if whole and not isinstance(size, int) else str(size)
    try:
        byte_size(written)
    except OverflowError as error:
        raise OutputError("max_shard_size is beyond every size; use one such as 5GB or 500MB") from error
    return written
