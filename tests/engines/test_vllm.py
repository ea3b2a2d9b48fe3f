"""Every "yes" about vLLM is a run: scores and greedy text are transformers', and the cache is as small as promised.

`make test-vllm` sets MHCONVERT_VLLM_PYTHON, the interpreter of an environment that has vLLM, and MHCONVERT_ENGINES, the
file of the documentation's table, which these tests fill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mhconvert.eval.vllm.engine import Engine, EngineError
from tests.conftest import Cli
from tests.engines.engines_table import EnginesTable
from tests.engines.exported_forms import KINDS, LAYERS, NEW_TOKENS, Forms, in_transformers, prompts
from tests.engines.vllm_run import BFLOAT16, FLOAT32, PYTHON, compare, needs_vllm, worst

pytestmark = needs_vllm

DONOR = 2 * 8 * 128 * LAYERS * FLOAT32  # bytes of the donor's cache of a token
LATENT_ROW = 512 + 64
LATENT = LATENT_ROW * LAYERS * FLOAT32


@pytest.fixture(scope="module")
def forms(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(cli, tmp_path_factory.mktemp("forms"))


@dataclass(frozen=True)
class Served:
    """A form and the bytes a token that its cache has in float32."""

    name: str
    make: Callable[[Forms], Path]
    cache_bytes: int
    donor_bytes: int = DONOR


def portable(forms: Forms, kind: str = "llama") -> Path:
    return forms.portable(128, LATENT_ROW / (2 * 8 * 128), kind)


def narrow(forms: Forms) -> Path:
    return forms.portable(64, (128 + 64) / (2 * 8 * 64))


SERVED = [
    Served("donor", lambda forms: forms.donor(128), DONOR),
    Served(
        "deepseek_v3, row 512 + 64",
        lambda forms: forms.exported(portable(forms), "deepseek_v3"),
        LATENT,
    ),
    Served(
        "deepseek_v3, row 128 + 64 with --pad-row 576, heads of 64",
        lambda forms: forms.exported(narrow(forms), "deepseek_v3", "--pad-row", 576),
        LATENT,
        DONOR // 2,
    ),
    Served(
        "own, row 512 + 64",
        lambda forms: forms.exported(portable(forms), "own"),
        LATENT,
    ),
    Served(
        "youtu, row 512 + 64",
        lambda forms: forms.exported(portable(forms), "youtu"),
        LATENT,
    ),
    Served(
        "dha --equal-heads, as nemotron-nas",
        lambda forms: forms.exported(forms.dha("--equal-heads", "--kv-budget", 0.5), "nemotron-nas"),
        DONOR // 2,
    ),
    Served("dha --uniform", lambda forms: forms.dha("--uniform", "--kv-budget", 0.5), DONOR // 2),
    Served("hydra, merged", lambda forms: forms.merged, DONOR),
]


@pytest.mark.parametrize("form", SERVED, ids=[form.name for form in SERVED])
def test_vllm_computes_what_transformers_computes(form: Served, forms: Forms, engines: EnginesTable) -> None:
    found = compare(form.make(forms), prompts())
    assert found.difference < 1e-4
    assert found.greedy_equal
    assert found.about["cache_bytes_per_token"] == form.cache_bytes
    share = form.cache_bytes / form.donor_bytes
    engines.add(form.name, found.about, difference=found.difference, cache=form.cache_bytes, share=share)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama"])
def test_vllm_finds_the_latent_of_our_class_by_its_structure(kind: str, forms: Forms) -> None:
    """Biases, or another rotary: what it found is in the cache, which is the latent's and not that of expanded keys."""
    found = compare(forms.exported(portable(forms, kind), "own"), prompts())
    assert found.difference < 1e-4
    assert found.greedy_equal
    assert found.about["cache_bytes_per_token"] == LATENT


def test_bfloat16_costs_no_more_than_the_donors(forms: Forms, engines: EnginesTable) -> None:
    """Beside transformers in float32, so that the rounding of weights is in it, as in what the donor loses."""
    donor, latent = forms.donor(128), forms.exported(portable(forms), "deepseek_v3")
    yardstick, found = (compare(folder, prompts(), "bfloat16") for folder in (donor, latent))
    assert found.difference <= BFLOAT16 * yardstick.difference
    for name, each, held in (("donor", yardstick, DONOR), ("deepseek_v3, row 512 + 64", found, LATENT)):
        assert each.about["cache_bytes_per_token"] == held / 2
        row = {"difference": each.difference, "cache": held // 2, "share": held / DONOR}
        engines.add(f"{name}, bfloat16", each.about, **row)


def test_a_lora_is_served_beside_its_donor(forms: Forms, engines: EnginesTable) -> None:
    """The adapter's requests are the merged model's, those without it the donor's."""
    lora, donor, rows = forms.exported(forms.adapter, "lora"), forms.donor(128), prompts()
    merged, texts = in_transformers(forms.merged, rows)
    expected = {None: in_transformers(donor, rows)[0], lora: merged}
    more = {"enable_lora": True, "max_lora_rank": 16}
    with Engine(donor, python=PYTHON, dtype="float32", max_model_len=512, **more) as engine:
        # One by one: vLLM 0.32 on a CPU does not score several rows together where there is an adapter.
        found = {adapter: [engine.score([row], adapter)[0] for row in rows] for adapter in expected}
        greedy = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        made = [engine.generate([row], greedy, lora)[0]["tokens"] for row in rows]
        about = engine.about
    difference = max(worst(found[adapter], scores) for adapter, scores in expected.items())
    assert (expected[None][2] - expected[lora][2]).abs().max() > 0.1
    assert difference < 1e-4
    assert made == texts
    assert about["cache_bytes_per_token"] == DONOR
    engines.add("hydra, as lora beside its donor", about, difference=difference, cache=DONOR, share=1.0)


def test_a_row_that_no_mla_kernel_takes_is_refused(forms: Forms, engines: EnginesTable) -> None:
    folder = forms.exported(narrow(forms), "deepseek_v3")
    with (
        pytest.raises(EngineError, match="is not supported by MLA") as refused,
        Engine(folder, python=PYTHON, dtype="float32", max_model_len=512) as engine,
    ):
        engine.score(prompts())
    assert str(folder) in str(refused.value)
    with Engine(forms.donor(64), python=PYTHON, dtype="float32", max_model_len=512) as engine:
        assert len(engine.score(prompts())) == 3
        engines.add("deepseek_v3, other rows", engine.about, refused="head size is not 320, 512 or 576")


def test_eval_runs_tasks_in_vllm(cli: Cli, forms: Forms) -> None:
    """The accuracies are those of transformers; vLLM's environment is not that of mhconvert."""
    folder = forms.exported(portable(forms), "deepseek_v3")
    words = (
        "eval",
        folder,
        "--suite",
        "quick",
        "--limit",
        8,
        "--max-length",
        256,
        "--dtype",
        "float32",
        "--json",
    )
    ours, theirs = (
        json.loads(_done(cli(*words, *more)).stdout)
        for more in ((), ("--backend", "vllm", "--python", PYTHON))
    )
    assert theirs["versions"]["vllm"].startswith("0.")
    a, b = ([m["value"] for r in each["tasks"][0]["metrics"] for m in r["models"]] for each in (ours, theirs))
    assert a == pytest.approx(b, rel=1e-3)


def test_what_vllm_does_not_load_is_named_with_the_way_out(cli: Cli, forms: Forms) -> None:
    asked = ("--suite", "quick", "--limit", 2, "--backend", "vllm", "--python", PYTHON)
    raw = cli("eval", portable(forms), *asked)
    assert raw.returncode == 1
    assert "has mhconvert's own class of mla, which vllm does not load" in raw.stderr
    assert f"mhconvert export {portable(forms)} --to auto" in raw.stderr
    adapter = cli("eval", forms.adapter, *asked)
    assert adapter.returncode == 1
    assert "mhconvert merge" in adapter.stderr


def test_speed_is_timed_in_turns(forms: Forms, tmp_path: Path) -> None:
    """The script of the figures, on loads that are too small to say anything."""
    script, file = Path(__file__).parents[2] / "benchmarks" / "vllm_speed.py", tmp_path / "speed.json"
    folders = [forms.donor(128), forms.exported(portable(forms), "deepseek_v3")]
    small = (
        "--contexts",
        "96,128",
        "--batches",
        "1,3",
        "--new-tokens",
        "4",
        "--repeats",
        "2",
        "--cache",
        "1",
    )
    command = [
        sys.executable,
        str(script),
        *map(str, folders),
        "--python",
        str(PYTHON),
        *small,
        "-o",
        str(file),
    ]
    _done(subprocess.run(command, capture_output=True, text=True, check=False))
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["context"], row["batch"]) for row in rows] == [
        (folder.name, context, batch) for context in (96, 128) for batch in (1, 3) for folder in folders
    ]
    assert {row["cache"] for row in rows} == {DONOR, LATENT}
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in rows)
    assert all(len(row["steps"]) == 2 and len(row["steps"][0]) == 4 for row in rows)


def _done(run: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert run.returncode == 0, run.stderr
    return run
