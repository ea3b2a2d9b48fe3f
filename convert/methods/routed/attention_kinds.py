"""Which file holds routed heads on a donor's attention, and what a key costs there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mhconvert.errors import UnsupportedError

from . import modeling_moh_dha, modeling_moh_mla

FILES = {"modeling_dha": modeling_moh_dha, "modeling_mla": modeling_moh_mla}


def routed_file(donor: Any, otherwise: Any) -> Any:
    """The module with the routed classes of the model class `donor`; `otherwise` for classes of transformers."""
    return FILES.get(donor.__module__.rpartition(".")[2], otherwise)


def is_converted(config: Any) -> bool:
    """Whether the class of a donor's configuration is one of a method, not of transformers."""
    return not type(config).__module__.startswith("transformers.")


def require_routable(config: Any, route: str) -> None:
    """Raise UnsupportedError for converted attention whose heads cannot be routed so."""
    if route == "groups" and is_converted(config):
        raise UnsupportedError(
            "route groups needs query heads that share one KV head, and in this donor K and V are converted: its "
            "heads share none, or all of them the latents; choose --route heads"
        )
    if getattr(config, "k_fusion", None) is not None or getattr(config, "v_fusion", None) is not None:
        raise UnsupportedError(
            "its heads are still to be fused, which changes them: mhconvert heal CKPT --fusion 2 first, then moh"
        )


def key_flops(config: Any, index: int, head_dim: int) -> int:
    """FLOPs of one query head and one key: the score, and its part of the output; of latents in absorbed form."""
    if getattr(config, "rope_frequencies", None) is None:
        return 4 * head_dim
    rank, rotary = config.latent_rank(index), 2 * len(config.layer_frequencies(index))
    return 4 * rank + 2 * rotary * (1 + config.rope_in_latent)


def routed_donors() -> tuple[Callable[[Any], Any], ...]:
    """Of each method whose heads are routed, the function from a family's configuration class to its model class."""
    from ..dha.converted_class import converted_class as of_dha
    from ..mla.converted_class import converted_class as of_mla

    return of_dha, of_mla
