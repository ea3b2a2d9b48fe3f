"""An option that another one, or the lack of one, leaves without effect is wrong usage: its name and why."""

from __future__ import annotations

import pytest

from tests.conftest import Cli

IGNORED = {
    "eval x --text a.txt --limit 5": "--limit is of tasks",
    "eval x --text a.txt --num-fewshot 0": "--num-fewshot is of tasks",
    "eval x --text a.txt --batch-size 2": "--batch-size is of tasks",
    "eval x --text a.txt --max-length 64": "--max-length is of tasks",
    "eval x --text a.txt --backend vllm": "--backend is of tasks",
    "eval x --suite quick --python p": "--python is of --backend vllm",
    "eval x --suite quick --backend vllm --batch-size 2": "--batch-size is of --backend hf",
    "eval x --text a.txt --data d": "--data is of tasks",
    "eval x --text a.txt --include-path d": "--include-path is of tasks",
    "eval x --retrieval --chat-template": "--chat-template is of tasks",
    "eval x --text a.txt --run-generated-code": "--run-generated-code is of tasks",
    "eval x --text a.txt --dtype bfloat16": "--dtype is of tasks and of --retrieval, --generation and --refusals",
    "eval x --retrieval --batch-size 2": "--batch-size is of tasks and --generation",
    "eval x --suite standard --prompts a.txt": "--prompts is of --generation",
    "eval x --suite standard --max-new-tokens 9": "--max-new-tokens is of --generation",
    "eval x --generation --limit 9": "--limit is of tasks",
    "eval x --tasks piqa --sequences 4": "--sequences is of texts",
    "eval x --suite quick --sequence-length 64": "--sequence-length is of texts",
    "eval x --text a.txt --retrieval-lengths 512": "--retrieval-lengths is of --retrieval",
    "eval x --text a.txt --long-context window --chunks 8": "--chunks is of --long-context longheads",
    "generate x hello --chunk-size 64": "--chunk-size is of --long-context longheads",
    "heal x --layer-tokens 1M --lr 1e-3": "--lr is of --tokens",
    "heal x --layer-tokens 1M --loss kl": "--loss is of --tokens",
    "heal x --layer-tokens 1M --rank 4": "--rank is of --tokens",
    "heal x --layer-tokens 1M --warmup 0.0": "--warmup is of --tokens",
    "heal x --tokens 1M --train attention --rank 4": "--rank is of --train lora and hydra, not of attention",
    "heal x --tokens 1M --fusion 2 --rank 4": "--rank is of --train lora and hydra, not of attention",
    "heal x --tokens 1M --skip-bad": "--skip-bad is of files and datasets",
    "heal x --tokens 1M --data self --skip-bad": "--skip-bad is of files and datasets",
    "generate x hello --seed 0": "--seed is of sampling",
    "generate x hello --temperature 0 --seed 5": "--seed is of sampling",
    "curve x --to mla --sequences 4": "--sequences is of --text",
    "curve x --to mla --force": "--force replaces FILE",
    "bench x --to dha": "--to goes with --random",
    "bench x --kv-budget 0.5": "--kv-budget goes with --random",
    "bench x --random --to dha --reexpand": "--reexpand is of mla",
}


@pytest.mark.parametrize("words", IGNORED)
def test_an_ignored_option_is_wrong_usage(here: Cli, words: str) -> None:
    done = here(*words.split())
    assert done.returncode == 2
    said = " ".join(done.stderr.replace("│", " ").split())
    assert IGNORED[words] in said
    assert "leave it out" in said or "goes with --random" in said


@pytest.mark.parametrize(
    "words",
    [
        "eval x --tasks piqa --limit 5 --dtype bfloat16 --batch-size 2",
        "eval x --retrieval --dtype bfloat16",
        "eval x --generation --prompts a.txt --max-new-tokens 9 --dtype bfloat16 --batch-size 2",
        "eval x --text a.txt --sequences 4 --sequence-length 64",
        "heal x --layer-tokens 1M --tokens 1M --lr 1e-3 --rank 4 --train hydra",
        "heal x --layer-tokens 1M --data a.txt --skip-bad --train attention",
        "generate x hello --temperature 1 --seed 5",
        "curve x --to mla --text a.txt --sequences 4",
        "bench x --random --to dha --kv-budget 0.5",
        "bench x --random --reexpand",
    ],
)
def test_an_option_that_counts_is_no_wrong_usage(here: Cli, words: str) -> None:
    assert here(*words.split()).returncode == 1  # there is no x
