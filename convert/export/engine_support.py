"""Which serving engines load an export, from the sizes of its attention alone.

Statements about engines were read in their sources (vLLM 0.33, SGLang 0.5.23, llama.cpp of 2026); only transformers and
llama.cpp have been run on these exports.
"""

from __future__ import annotations

from dataclasses import dataclass

# (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) of vLLM's prefill kernels.
PREFILL_WIDTHS = ((128, 64, 128), (192, 64, 256), (64, 64, 128), (256, 0, 256))
FAST_ROWS = (512 + 64,)  # cached elements that FlashMLA, FlashAttention-MLA and CUTLASS take


@dataclass(frozen=True)
class Sizes:
    """Widths of an export's attention. The cache holds `row` elements per token and layer."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def row(self) -> int:
        return self.kv_lora_rank + self.qk_rope_head_dim


def engines(to: str, sizes: Sizes) -> list[tuple[str, bool, str]]:
    """The engines for an export in the form `to`.

    Returns:
        For each: its name, whether it serves the export with the small cache, and how or why not.
    """
    if to == "own":
        return _own(sizes)
    table = [
        ("transformers ≥ 5.16.1", True, "caches latent and rotary key"),
        ("transformers < 5.16.1", False, "loads and computes the same, but caches expanded keys and values"),
        ("any of them in float16", False, "the latent's norm leaves its range: serve in bfloat16 or float32"),
    ]
    if to == "youtu":
        return [
            *table,
            (
                "vLLM",
                True,
                "by its Transformers backend, which finds the latent by the attention's structure",
            ),
            ("SGLang", False, "does not know the class as latent attention and would cache expanded keys"),
            ("llama.cpp", False, "loses RoPE scaling; export to gguf refuses it"),
        ]
    return [
        *table,
        ("vLLM, Triton kernel", _prefill(sizes) is None, _prefill(sizes) or "any GPU, any row"),
        ("vLLM, FlashMLA and its like", _fast(sizes) is None, _fast(sizes) or "the row is 512 + 64"),
        ("SGLang", True, "as DeepSeek-V3"),
        ("llama.cpp", True, "after export to gguf, with a BPE tokenizer that it knows"),
    ]


def padded_value(nope: int, rope: int, value: int) -> int:
    """The smallest v_head_dim ≥ `value` that a prefill kernel takes with these widths; `value` where none does."""
    widths = [wide for n, r, wide in PREFILL_WIDTHS if (n, r) == (nope, rope) and wide >= value]
    return min(widths, default=value)


def _prefill(sizes: Sizes) -> str | None:
    """Why vLLM's prefill kernels do not take these widths; None where one does."""
    widths = (sizes.qk_nope_head_dim, sizes.qk_rope_head_dim, sizes.v_head_dim)
    if widths in PREFILL_WIDTHS:
        return None
    return f"its prefill kernels take (nope, rope, v) of {', '.join(map(str, PREFILL_WIDTHS))}, and this is {widths}"


def _fast(sizes: Sizes) -> str | None:
    """Why the fast MLA kernels do not take these widths; None where they do."""
    if _prefill(sizes) is not None:
        return _prefill(sizes)
    if sizes.row in FAST_ROWS and sizes.kv_lora_rank == 512:
        return None
    return f"want a row of 512 + 64, and this is {sizes.kv_lora_rank} + {sizes.qk_rope_head_dim}"


def _own(sizes: Sizes) -> list[tuple[str, bool, str]]:
    """The engines for the form `own`."""
    return [
        ("transformers ≥ 5.16.1", True, "trust_remote_code=True; caches latent and rotary key"),
        (
            "vLLM",
            _prefill(sizes) is None,
            _prefill(sizes)
            or "--trust-remote-code, by its Transformers backend, which finds the latent by the structure",
        ),
        ("SGLang", False, "its fallback has no latent attention and would cache expanded keys"),
        ("llama.cpp", False, "does not know the class"),
    ]
