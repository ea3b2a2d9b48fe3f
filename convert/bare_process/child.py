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
from typing import Any


def cache_storage(cache: Any, element_bytes: int = 2) -> tuple[int, float]:
    """(bytes, elements) of the tensor storage of a transformers cache, over all layers.

    Storages are counted once and in full, as a slice keeps its whole buffer in memory. Bytes of codes (uint8 tensors),
    and of states, which a linear layer has by number, count as elements of `element_bytes` each. Counters of a static
    cache do not count. Tensors in a tuple that a layer holds count too.
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
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
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


def filled_cache(model: Any, tokens: int, element_bytes: int = 2) -> tuple[str, int, float]:
    """Class name, bytes and elements of the cache that `generate` makes for `model`, of stock layers, of codes or with
    states, when it has read `tokens`.

    The last token comes alone, as in decoding: behind a window the cache then lets go of what it read before. One layer
    at a time is in memory.
    """
    from types import SimpleNamespace

    from transformers import DynamicCache

    config = model.config
    cache, size, elements = DynamicCache(config=config), 0, 0.0
    windows, linear = getattr(config, "kv_windows", None), getattr(config, "linear_layers", None) or ()
    if windows:
        sys.modules[type(model).__module__].place_windows(cache, windows, False)
    for index in range(config.num_hidden_layers):
        attention = model.get_decoder().layers[index].self_attn
        if index in linear:
            _read_tokens(attention, cache, element_bytes)
        else:
            _fill_layer(config, attention, cache, index, tokens)
        layer: Any = cache.layers[index]
        of_layer = cache_storage(SimpleNamespace(layers=[layer]), element_bytes)
        size, elements = size + of_layer[0], elements + of_layer[1]
        layer.keys = layer.values = None
    return type(cache).__name__, size, elements


def _fill_layer(config: Any, attention: Any, cache: Any, index: int, tokens: int) -> None:
    """Cache zeros as the keys and values, or the codes, of `tokens` tokens in one layer."""
    import torch

    heads = config.num_key_value_heads or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    coded = hasattr(attention, "code") and hasattr(config, "kv_code_counts")
    for count in (tokens - 1, 1):
        keys, values = (torch.zeros(1, heads, count, width, dtype=torch.bfloat16) for _ in "kv")
        if coded:
            keys = torch.zeros(1, 1, count, attention.code.bytes, dtype=torch.uint8)
            values = keys[..., :0]
        cache.update(keys, values, index)


def _read_tokens(attention: Any, cache: Any, element_bytes: int) -> None:
    """Have a linear layer read two tokens in the written dtype: its states have the same size for any number."""
    import copy

    import torch

    layer = copy.deepcopy(attention).to(torch.float32 if element_bytes == 4 else torch.bfloat16)
    dtype = next(layer.parameters()).dtype
    layer(torch.zeros(1, 2, layer.config.hidden_size, dtype=dtype), past_key_values=cache)


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
    if context:
        tokens, (name, size, elements) = context, filled_cache(model, context, element_bytes)
    else:
        cache = output.past_key_values
        name, tokens = type(cache).__name__, int(cache.get_seq_length())
        size, elements = cache_storage(cache, element_bytes)
    return {
        "sample": {
            "prompt": prompt,
            "text": tokenizer.decode(
                output.sequences[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
            ),
        },
        "cache": {
            "type": name,
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
