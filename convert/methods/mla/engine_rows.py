"""The widths of latent attention that serving engines take, and what a portable plan says about them; no torch.

Sources: vLLM 0.32, MLACommonBackend.get_supported_head_sizes, cpu_mla.py and mla/prefill/flash_attn.py.
"""

from __future__ import annotations

VLLM = "vLLM 0.32"
ROWS = (320, 512, 576)  # kv_lora_rank + qk_rope_head_dim of which every latent cache of vLLM has one
FAST_ROW = (
    512,
    64,
)  # kv_lora_rank and qk_rope_head_dim of its CPU kernel, FlashMLA, FlashAttention-MLA and CUTLASS
# (qk_nope_head_dim, qk_rope_head_dim, v_head_dim) that its MLA prefill takes on Hopper and older GPUs.
KERNEL_SHAPES = ((128, 64, 128), (192, 64, 256), (64, 64, 128), (256, 0, 256))
LEAST_SHARE = 1 / 2  # of the elements that a budget allows; a smaller row is not what was asked for


def aimed_row(allowed: int, donor: int) -> int | None:
    """The largest of ROWS within `allowed` elements that uses at least LEAST_SHARE of them; None where there is none.

    Args:
        allowed: elements a token and layer that the budget allows.
        donor: of the donor, of which a row has to save something; a budget of all of them aims at no row.
    """
    fitting = [row for row in ROWS if LEAST_SHARE * allowed <= row <= allowed and allowed < donor]
    return max(fitting, default=None)


def row_notice(row: int, rope: int, allowed: int, donor: int) -> str:
    """A sentence about the engines that take a portable row of `row` elements; "" where all do and none was aimed at.

    Args:
        rope: elements of it that are the rotary key.
        allowed, donor: as for `aimed_row`.
    """
    named = f"a row of {row} elements (kv_lora_rank {row - rope} + qk_rope_head_dim {rope})"
    if row in ROWS:
        if row == allowed:
            return ""
        return (
            f"the budget allows {allowed} elements a token and layer, and {VLLM} takes {_listed(ROWS)}: the result has "
            f"{named}; --kv-lora-rank {allowed - rope} --qk-rope-head-dim {rope} uses all of it, for the other engines"
        )
    wider = next((width for width in ROWS if width > row), None)
    saving = [width for width in ROWS if width < donor]
    ways = [f"a --kv-budget of {_shares(saving, donor)} makes one that it takes"] if saving else []
    costly = f", more than the donor's own {donor}" if wider and wider >= donor else ""
    ways += [f"`export --pad-row {wider}` widens it with zeros{costly}"] if wider else []
    return (
        f"{VLLM} takes latent rows of {_listed(ROWS)} elements and not {named}: llama.cpp, transformers and, by its "
        f"source, SGLang remain; {' and '.join(ways)}"
    )


def _listed(rows: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, rows[:-1]))} or {rows[-1]}"


def _shares(rows: list[int], donor: int) -> str:
    """The budgets of `rows`, rounded up, as in "0.2813 (576)"."""
    return " or ".join(f"{-(-10000 * row // donor) / 10000:g} ({row})" for row in rows)
