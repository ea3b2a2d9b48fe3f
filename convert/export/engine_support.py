"""Which serving engines load an export, from the sizes of its attention and the dtype of its weights alone.

What was run says so: transformers 5.16.1 and 5.23, vLLM 0.32 on a CPU, llama.cpp of 2026. The rest was read in sources:
vLLM 0.32 on GPUs, SGLang 0.5.23, and of 2026 mlx-lm (models/deepseek_v3.py, utils.py) and exllamav3
(architecture/deepseek_v3.py, modules/mla_attn.py, modules/linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mhconvert.errors import ExportError

from ..methods.mla.engine_rows import FAST_ROW, KERNEL_SHAPES, ROWS, VLLM

Engine = tuple[str, bool, str]  # its name, whether it serves the export with the small cache, how or why not
Named = Literal["vllm", "sglang", "llama.cpp", "transformers"]
MLX_LAYERS = 61  # tensors of a layer of this index are left aside, as those of DeepSeek's prediction layer
UNKNOWN = "does not know the class"
FLOAT16 = (
    "any of them in float16",
    False,
    "the latent's norm leaves its range: serve in bfloat16 or float32",
)


@dataclass(frozen=True)
class Sizes:
    """Widths of an export's attention, and its number of layers. The cache holds `row` elements per token and layer."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    layers: int = 1

    @property
    def row(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


def engines(
    to: str, sizes: Sizes, dtype: str = "bfloat16", required: Named | None = None
) -> list[list[str | bool]]:
    """The engines for an export in the form `to` with weights of `dtype`, as JSON has them.

    Raises:
        ExportError: with the reason, where `required` is none of them.
    """
    rows = _engines(to, sizes, dtype)
    if required is not None:
        require(rows, required)
    return [list(row) for row in rows]


def _engines(to: str, sizes: Sizes, dtype: str) -> list[Engine]:
    code = "trust_remote_code=True; " if to == "own" else ""
    table = [("transformers ≥ 5.16.1", True, f"{code}caches latent and rotary key (run)")]
    if to == "own":
        unknown = "its fallback has no latent attention and would cache expanded keys (read in source)"
        others = [
            ("SGLang", False, unknown),
            ("llama.cpp", False, UNKNOWN),
            ("MLX, exllamav3", False, UNKNOWN),
        ]
        return [*table, *_vllm(to, sizes, dtype), *others]
    expanded = "loads and computes the same, but caches expanded keys and values"
    table += [("transformers < 5.16.1", False, expanded), FLOAT16, *_vllm(to, sizes, dtype)]
    if to == "youtu":
        unknown = "does not know the class as latent attention and would cache expanded keys (read in source)"
        return [
            *table,
            ("SGLang", False, unknown),
            ("llama.cpp", False, "loses RoPE scaling; export to gguf refuses it"),
            ("MLX, exllamav3", False, UNKNOWN),
        ]
    return [
        *table,
        ("SGLang", True, "as DeepSeek-V3 (read in source)"),
        ("llama.cpp", True, "after export to gguf, with a BPE tokenizer that it knows (run)"),
        (
            "MLX",
            _mlx(sizes) is None,
            _mlx(sizes) or "mlx-lm, as DeepSeek-V3; caches the latent (read in source)",
        ),
        (
            "exllamav3",
            False,
            "loads weights in float16, in which the latent's norm leaves its range (read in source)",
        ),
    ]


def padded_value(nope: int, rope: int, value: int) -> int:
    """The smallest v_head_dim ≥ `value` that a prefill kernel takes with these widths; `value` where none does."""
    widths = [wide for n, r, wide in KERNEL_SHAPES if (n, r) == (nope, rope) and wide >= value]
    return min(widths, default=value)


def require(rows: Sequence[Engine], engine: Named) -> None:
    """Raise ExportError unless some row of `engine`, such as vLLM on CPUs, serves the export."""
    own = [row for row in rows if row[0].lower().startswith(engine)]
    if not any(serves for _, serves, _ in own):
        reasons = "; ".join(f"{name}: {why}" for name, _, why in own) or "it does not know the form"
        raise ExportError(f"{engine} does not take this export: {reasons}")


def warning(rows: Sequence[Sequence[str | bool]]) -> str | None:
    """What a user should know before an export is written that vLLM refuses when the first request comes; or None."""
    own = [row for row in rows if str(row[0]).startswith(VLLM)]
    return None if any(serves for _, serves, _ in own) else f"{VLLM} will refuse it: {own[0][2]}"


def _vllm(to: str, sizes: Sizes, dtype: str) -> list[Engine]:
    """vLLM's rows for any of these forms: all have one latent cache, and the class is its own or found by structure."""
    how = {
        "own": "--trust-remote-code, by its Transformers backend, which finds the latent by the structure",
        "youtu": "by its Transformers backend, which finds the latent by the structure",
    }.get(to, "as DeepSeek-V3")
    wide = " --dtype bfloat16, as its GPU kernels have no float32;" if dtype == "float32" else ""
    fast = "FlashMLA and its like, or Triton" if _fast(sizes) is None else "its Triton kernel alone"
    on_gpu, on_cpu = _row(sizes) or _prefill(sizes), _fast(sizes)
    return [
        (f"{VLLM} on GPUs", on_gpu is None, on_gpu or f"{how};{wide} {fast} (read in source)"),
        (f"{VLLM} on CPUs", on_cpu is None, on_cpu or f"{how} (run)"),
    ]


def _mlx(sizes: Sizes) -> str | None:
    """Why mlx-lm does not take an export; None where it does."""
    if sizes.layers <= MLX_LAYERS:
        return None
    return f"mlx-lm leaves the tensors of layer {MLX_LAYERS} aside, and this has {sizes.layers} layers (read in source)"


def _row(sizes: Sizes) -> str | None:
    """Why none of vLLM's latent caches takes a row of these widths; None where one does."""
    if sizes.row in ROWS:
        return None
    wider = next((row for row in ROWS if row > sizes.row), None)
    way_out = f"; --pad-row {wider} widens it with zeros" if wider else ""
    return (
        f"its latent caches take kv_lora_rank + qk_rope_head_dim of {', '.join(map(str, ROWS))}, and this is "
        f"{sizes.kv_lora_rank} + {sizes.qk_rope_head_dim} = {sizes.row}{way_out}"
    )


def _prefill(sizes: Sizes) -> str | None:
    """Why vLLM's prefill kernels do not take these widths; None where one does."""
    widths = (sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim)
    if widths in KERNEL_SHAPES:
        return None
    return f"its prefill kernels take (nope, rope, v) of {', '.join(map(str, KERNEL_SHAPES))}, and this is {widths}"


def _fast(sizes: Sizes) -> str | None:
    """Why kernels that are made for one row, such as that of CPUs, do not take this one; None where they do."""
    if (sizes.kv_lora_rank, sizes.qk_rope_head_dim) == FAST_ROW:
        return None
    rank, rope = FAST_ROW
    way_out = f"; --pad-row {rank + rope} widens it with zeros" if sizes.row < rank + rope else ""
    return (
        f"its kernel takes kv_lora_rank {rank} + qk_rope_head_dim {rope} alone, and this is {sizes.kv_lora_rank} + "
        f"{sizes.qk_rope_head_dim}{way_out}"
    )
