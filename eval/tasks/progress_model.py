"""lm-eval's wrapper of a transformers model in memory, with progress."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM


class ProgressLM(HFLM):
    """An `HFLM` that reports the rows of the current task; under `accelerate launch` it runs on several GPUs.

    `simple_evaluate` splits the documents over the processes by `rank` and `world_size`, as for models that lm-eval
    loads itself.

    Attributes:
        on_rows: called with the rows done and the rows of the task after each call of the model.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length)
        self.on_rows: Callable[[int, int], None] = lambda done, total: None
        self._done, self._total, self._counted = 0, 0, False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        self._done, self._total, self._counted = 0, 0, False
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        self._done, self._counted = 0, True
        self._total = sum(-(-length // self.max_length) for length in lengths)  # windows without overlap
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        if not self._counted:
            self._total += len(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        logits = super()._model_call(inps, attn_mask, labels)
        self._done += len(inps)
        self.on_rows(min(self._done, self._total), self._total)
        return logits
