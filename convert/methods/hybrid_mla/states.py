"""What the states of linear layers weigh. Pure.

The recurrent state is float32 whatever the model's dtype, as transformers makes it; the convolution's is not.
"""

from __future__ import annotations

from typing import Any

CONV_KERNEL = 4  # tokens that a mixer's convolution reads, which its state holds
STATE_ITEM = 4  # bytes


def state_bytes(heads: int, head_dim: int, element_bytes: int) -> int:
    """Of a layer's states, for a text of any length: a matrix for each head, and what its convolution reads of the
    queries, keys and values.
    """
    return heads * head_dim * (STATE_ITEM * head_dim + element_bytes * 3 * CONV_KERNEL)


def facts_by_length(context: int, codes: int, states: int, donor: int) -> dict[str, Any]:
    """{context, state_bytes: of all layers, bytes and shares of the donor's 16-bit cache by length}.

    codes, donor: bytes of a token, all layers.
    """
    lengths = [length for length in (512, 2048, 8192, 32768, 131072) if length < context] + [context]
    sizes = {length: codes * length + states for length in lengths}
    return {
        "context": context,
        "state_bytes": states,
        "bytes": {str(length): size for length, size in sizes.items()},
        "shares": {str(length): size / (donor * length) for length, size in sizes.items()},
    }
