"""Loads a checkpoint without mhconvert, as its users do, and prints the results of its checks as one line of JSON.

`reload.py` runs it as `python -I child.py FOLDER PROBE OPTIONS MODULES`, in a process where mhconvert cannot be
imported and only torch, transformers and the files in the folder are available. `mhconvert.eval` uses `cache_storage`
too, so that there is one definition of the size of a cache.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any


def cache_storage(cache: Any, element_bytes: int = 2) -> tuple[int, float]:
    """(bytes, elements) of the tensor storage of a transformers cache, over all layers.

    Storages are counted once and in full, as a slice keeps its whole buffer in memory, also on the meta device. Bytes
    of codes (uint8 tensors), and of states, which a linear layer has by number, count as elements of `element_bytes`
    each. Counters of a static cache do not count. Tensors in a tuple that a layer holds count too.
    """
    import torch

    size, elements = 0, 0.0
    seen: set[int] = set()
    for layer in cache.layers:
        own = list(vars(layer).values())
        states = [part for value in own if isinstance(value, dict) for part in value.values()]
        held = [part for value in own for part in (value if isinstance(value, tuple) else (value,))]
        for value in (*held, *states):
            if not isinstance(value, torch.Tensor) or value.numel() == 0:
                continue
            coded = value.dtype == torch.uint8 or any(value is state for state in states)
            if not (coded or value.is_floating_point()):
                continue
            storage = value.untyped_storage()
            if storage._cdata in seen:  # unlike its address, which is 0 of every one on the meta device
                continue
            seen.add(storage._cdata)
            size += storage.nbytes()
            elements += storage.nbytes() / (element_bytes if coded else value.element_size())
    return size, elements


def keep_token_ids(model: Any) -> None:
    """Reduce the model's generation settings to its token ids, so that the arguments of a call decide all else."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )


def peak_memory() -> int:
    """The peak resident size of this process in bytes: VmHWM if /proc exists, else from getrusage.

    On Linux ru_maxrss would include the resident size of the parent process at the start.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _compare(model: Any, probe: str) -> dict[str, float]:
    """The differences of the model's logits from those in `probe`, computed row by row.

    Args:
        probe: safetensors file with input_ids (rows, length) and logits (rows, length, vocab_size), float32.

    Returns largest_logit_difference, relative_logit_error (norm of the difference over that of the expected logits),
    logit_spread (smallest standard deviation of the expected logits of a row) and finite.
    """
    import torch
    from safetensors import safe_open

    largest = squares = 0.0
    spread: list[float] = []
    finite = True
    with safe_open(probe, framework="pt") as file:
        input_ids = file.get_tensor("input_ids").long()
        expected_rows = file.get_slice("logits")
        norm = 0.0
        for row in range(input_ids.shape[0]):
            logits = model(input_ids=input_ids[row : row + 1], use_cache=False).logits[0].float()
            expected = expected_rows[row : row + 1][0].float()
            spread.append(expected.std().item())
            finite = finite and bool(torch.isfinite(logits).all())
            norm += expected.square().sum(dtype=torch.float64).item()
            difference = logits.sub_(expected)
            squares += difference.square().sum(dtype=torch.float64).item()
            largest = max(largest, difference.abs().max().item())
    return {
        "largest_logit_difference": largest,
        "relative_logit_error": (squares / max(norm, 1e-30)) ** 0.5,
        "logit_spread": min(spread),
        "finite": finite,
    }


def filled_cache(
    model: Any, cache: Any, lengths: Sequence[int], element_bytes: int = 2
) -> list[tuple[int, float]]:
    """(bytes, elements) of the cache that `generate` made for `model` when it holds so many tokens of one sequence.

    Each layer is given states like those of one token more, on the meta device, where tensors have sizes and take no
    memory. The last token comes alone, as in decoding: behind a window the cache then lets go of what it read before.
    A layer that is given no states holds as much of any text; that of a linear one is in the written dtype, of
    `element_bytes`. What the cache held is lost.
    """
    import torch

    for index in getattr(model.config, "linear_layers", None) or ():
        _read_tokens(model.get_decoder().layers[index].self_attn, cache, index, element_bytes)
    given: dict[int, tuple[Any, Any]] = {}
    update = cache.update

    def record(keys: Any, values: Any, index: int, *more: Any, **named: Any) -> Any:
        given[index] = keys, values
        return update(keys, values, index, *more, **named)

    cache.update = record
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=token, past_key_values=cache, use_cache=True)
    del cache.update
    sizes = []
    for length in lengths:
        for index, states in given.items():
            layer = cache.layers[index]
            layer.is_initialized = False  # older versions of transformers would keep its tokens as zeros
            layer.reset()
            for count in (length - 1, 1):
                layer.update(
                    *(x.new_empty((*x.shape[:2], count, *x.shape[3:]), device="meta") for x in states)
                )
        sizes.append(cache_storage(cache, element_bytes))
    return sizes


def _read_tokens(attention: Any, cache: Any, index: int, element_bytes: int) -> None:
    """Have a linear layer read two tokens in the written dtype: its states have the same size for any number."""
    import copy

    import torch
    from transformers.cache_utils import DynamicLayer

    layer = copy.deepcopy(attention).to(torch.float32 if element_bytes == 4 else torch.bfloat16)
    cache.layers[index] = DynamicLayer()
    tokens = torch.zeros(1, 2, layer.config.hidden_size).to(next(layer.parameters()))
    layer(tokens, past_key_values=cache)


def _generate(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, element_bytes: int, context: int | None
) -> dict[str, Any]:
    """A greedy continuation of `prompt`, as "sample", and the size of the cache after `generate`, as "cache".

    context: tokens with which the cache is filled instead; None: it is measured as `generate` leaves it.
    """
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    cache = output.past_key_values
    tokens = context or int(cache.get_seq_length())
    if context:
        [(size, elements)] = filled_cache(model, cache, [context], element_bytes)
    else:
        size, elements = cache_storage(cache, element_bytes)
    return {
        "sample": {
            "prompt": prompt,
            "text": tokenizer.decode(
                output.sequences[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
            ),
        },
        "cache": {
            "type": type(cache).__name__,
            "tokens": tokens,
            "bytes": size,
            "bytes_per_token": size / tokens,
            "elements_per_token": elements / tokens,
        },
    }


def main(folder: str, probe: str, options: dict[str, Any]) -> dict[str, Any]:
    """The results of `_compare` and `_generate` for the model in `folder`, with facts about the process.

    The code in the folder is run.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    if options.get("threads"):
        torch.set_num_threads(options["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    model.eval()
    keep_token_ids(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        result: dict[str, Any] = _compare(model, probe)
        written = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).dtype
        element_bytes = (written or torch.float32).itemsize
        result |= _generate(
            model,
            tokenizer,
            options["prompt"],
            options["max_new_tokens"],
            element_bytes,
            options.get("context"),
        )
    return result | {
        "model_class": type(model).__name__,
        "module": type(model).__module__.split(".")[0],
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_memory(),
    }


if __name__ == "__main__":
    sys.modules["mhconvert"] = None  # type: ignore[assignment]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_MODULES_CACHE": sys.argv[4]}
    print(json.dumps(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
