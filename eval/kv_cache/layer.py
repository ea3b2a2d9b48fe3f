"""The cache of one attention layer, as transformers wants it, with keys and values in formats of a few bits.

transformers' own `QuantizedLayer` does not serve: it returns a prompt's exact states and codes them afterwards, codes
everything anew whenever its residual is full, so that errors add up, groups keys and values along one axis, and needs
optimum-quanto or hqq for the bits. Its `Fp8QuantizedLayer` takes its scale from the prompt, which no engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .codes import GROUP
from .formats import Format, Stored


class CodedLayer(DynamicLayer):
    """A layer that grows; `window`: tokens that a query sees, itself included, where it does not see all.

    Groups of 32 tokens that no query will see again are dropped.

    Attributes:
        stored_keys, stored_values: what is in memory.
    """

    is_croppable = False  # groups of keys are coded together, so not every crop leaves no trace

    def __init__(self, keys: Format, values: Format, window: int | None = None) -> None:
        super().__init__()
        self.formats, self.window, self.is_sliding = (keys, values), window, window is not None
        self.stored_keys: Stored | None = None
        self.stored_values: Stored | None = None
        self.dropped = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stored_keys, self.stored_values = (
            form.empty(states) for form, states in zip(self.formats, (key_states, value_states), strict=True)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens that a query may see, (B, H, S, d) each, as `formats` reads them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.stored_keys is not None
        assert self.stored_values is not None
        keys, values = self.formats
        self.stored_keys, read_keys = keys.append(self.stored_keys, key_states)
        self.stored_values, read_values = values.append(self.stored_values, value_states)
        self._drop_unseen()
        return read_keys, read_values

    def _drop_unseen(self) -> None:
        """Drop whole groups that lie before the window of the next query."""
        if self.window is None or self.stored_keys is None or self.stored_values is None:
            return
        unseen = (self._held() - self.window + 1) // GROUP * GROUP
        if unseen > 0:
            keys, values = self.formats
            self.stored_keys = keys.without_first(self.stored_keys, unseen)
            self.stored_values = values.without_first(self.stored_values, unseen)
            self.dropped += unseen

    def _held(self) -> int:
        return 0 if self.stored_keys is None else self.formats[0].length(self.stored_keys)

    def get_seq_length(self) -> int:
        """The tokens that were cached, those dropped since included."""
        return self.dropped + self._held()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that `update` will return, the place of the first of them)."""
        return self._held() + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last −`tokens_to_remove` tokens. Raises ValueError where keys of them are coded in a group."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes minus the tokens to remove, as in transformers 5, not {tokens_to_remove}"
            )
        if tokens_to_remove == 0 or self.stored_keys is None or self.stored_values is None:
            return
        keys, values = self.formats
        self.stored_keys = keys.without_last(self.stored_keys, -tokens_to_remove)
        self.stored_values = values.without_last(self.stored_values, -tokens_to_remove)

    def reset(self) -> None:
        self.stored_keys = self.stored_values = None
        self.dropped, self.is_initialized = 0, False

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.stored_keys is not None and self.stored_values is not None:
            self.stored_keys = self.stored_keys.map(function)
            self.stored_values = self.stored_values.map(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices, ...])

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))
