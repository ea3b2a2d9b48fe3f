"""Every "yes" about llama.cpp is a run: scores, perplexity and greedy text are transformers', the cache is the planned.

`make test-llamacpp` sets MHCONVERT_LLAMA_SERVER, a llama-server, and MHCONVERT_ENGINES, the file of the documentation's
table, which these tests fill. Set it to another llama-server to test that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhconvert.convert.export.mla import gguf_writer
from tests.conftest import Cli
from tests.convert.export import deepseek2
from tests.convert.export.mla.test_gguf_writer import TEXTS, WRITTEN, save_tokenizer
from tests.engines import llama_server
from tests.engines.engines_table import EnginesTable
from tests.engines.exported_forms import LAYERS, NEW_TOKENS, Forms, in_transformers, prompts
from tests.engines.llama_gguf import write_llama
from tests.engines.llama_server import LlamaServer, LlamaServerError

PROGRAM = os.environ.get("MHCONVERT_LLAMA_SERVER", "")
pytestmark = pytest.mark.skipif(not PROGRAM, reason="MHCONVERT_LLAMA_SERVER names no llama-server")

VOCAB, CELLS = 320, 8192  # so many cells that the two decimals of the log are bytes enough
BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of an element; a block of 32 has a scale of two bytes
DONOR = 2 * 8 * 128 * LAYERS  # elements of a token
COMMAND = ["make test-llamacpp"]


@dataclass(frozen=True)
class Bounds:
    """Of the largest difference of log-probabilities, and of the relative difference of perplexity."""

    scores: float
    perplexity: float


# Two to six times what was measured; with 8 bits up to 0.27 and 0.8 %.
BOUNDS = {"f32": Bounds(2e-4, 1e-5), "f16": Bounds(4e-2, 5e-3)}
EIGHT_BITS = Bounds(0.5, 5e-2)


@pytest.fixture(scope="module")
def forms(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(cli, tmp_path_factory.mktemp("forms"))


def portable(forms: Forms, width: int = 128, row: int = 512 + 64) -> Path:
    return forms.portable(width, row / (2 * 8 * width))


def narrow(forms: Forms) -> Path:
    return portable(forms, 64, 128 + 64)


def uniform(forms: Forms) -> Path:
    return forms.dha("--uniform", "--kv-budget", 0.5)


def as_llama(folder: Path, kind: str) -> Path:
    """Beside the folder, which is of class Llama."""
    file = folder.with_name(f"{folder.name}-{kind}.gguf")
    return file if file.exists() else write_llama(folder, file, kind)


@dataclass(frozen=True)
class Served:
    """A form, the elements that its cache of K and of V has for a token, and the kinds of its weights and caches."""

    name: str
    folder: Callable[[Forms], Path]  # that transformers loads
    elements: tuple[int, int]
    weights: str
    caches: tuple[str, str]
    donor: int = DONOR

    @property
    def title(self) -> str:
        keys, values = self.caches
        return f"{self.name}, {self.weights}, {'cache' if keys == values else '-ctk'} {keys}"

    @property
    def bounds(self) -> Bounds:
        return EIGHT_BITS if "q8_0" in (self.weights, *self.caches) else BOUNDS[self.weights]

    @property
    def planned(self) -> tuple[float, float]:
        """Bytes of K and V for a token."""
        keys, values = (n * BYTES[kind] for n, kind in zip(self.elements, self.caches, strict=True))
        return keys, values

    def file(self, forms: Forms) -> Path:
        folder = self.folder(forms)
        return (
            forms.gguf(folder, self.weights) if "deepseek2" in self.name else as_llama(folder, self.weights)
        )


HEADS, HALF, LATENT = (DONOR // 2, DONOR // 2), (DONOR // 4, DONOR // 4), ((512 + 64) * LAYERS, 0)
RUNS = [("f32", ("f32", "f32")), ("f16", ("f16", "f16")), ("q8_0", ("f16", "f16"))]
RUNS_OF = {"latent": [*RUNS, ("f16", ("q8_0", "q8_0"))], "heads": [*RUNS, ("f16", ("q8_0", "f16"))]}
SERVED = [
    Served(name, folder, elements, *run)
    for name, folder, elements in (
        ("donor, as llama", lambda forms: forms.donor(128), HEADS),
        ("gguf (deepseek2), row 512 + 64", portable, LATENT),
        ("dha --uniform, as llama", uniform, HALF),
    )
    for run in RUNS_OF["heads" if elements[1] else "latent"]
]
SERVED += [
    Served(
        "gguf (deepseek2), row 128 + 64, heads of 64", narrow, ((128 + 64) * LAYERS, 0), *RUNS[1], DONOR // 2
    )
]


@pytest.mark.parametrize("form", SERVED, ids=[form.title for form in SERVED])
def test_llama_cpp_computes_what_transformers_computes(
    form: Served, forms: Forms, engines: EnginesTable
) -> None:
    about, folder = llama_server.about(PROGRAM), form.folder(forms)
    expected, _ = in_transformers(folder, prompts())
    options = ("-c", CELLS, "-ctk", form.caches[0], "-ctv", form.caches[1])
    if form.weights == "f32":
        options += ("-fa", "off")  # flash attention rounds to 16 bits here
    with LlamaServer(PROGRAM, form.file(forms), *options) as server:
        found = [torch.tensor(server.score(row, VOCAB)) for row in prompts()]
        at_once = [server.last(row, VOCAB) for row in prompts()]
        made = [server.greedy(row, NEW_TOKENS) for row in prompts()]
        cache = server.cache
    worst = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    worst = max(worst, *(abs(a - b[-1].item()) for a, b in zip(at_once, expected, strict=True)))
    of_text = perplexity(found) / perplexity(expected) - 1
    gap = below_best(folder, prompts(), made)
    assert worst < form.bounds.scores
    assert abs(of_text) < form.bounds.perplexity
    assert gap < 2 * form.bounds.scores
    assert cache.kinds == form.caches
    assert (cache.keys, cache.values) == pytest.approx(form.planned, abs=0.01 * 2**20 / CELLS)
    share = sum(form.planned) / (form.donor * BYTES["f32" if form.weights == "f32" else "f16"])
    told = {"difference": worst, "perplexity": of_text, "cache": round(sum(form.planned)), "share": share}
    engines.add(form.title, about, command=COMMAND, **told)


def perplexity(rows: list[torch.Tensor]) -> float:
    return float(torch.cat(rows).mean().neg().exp())


@torch.no_grad()
def below_best(folder: Path, rows: list[list[int]], made: list[list[int]]) -> float:
    """How far, at most, the log-probability of a continuation's token is below that of the best, in transformers.

    0: the continuations are its greedy ones. Small: they differ where two tokens are nearly as good.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    gaps = []
    for row, more in zip(rows, made, strict=True):
        assert len(more) == NEW_TOKENS
        scores = model(torch.tensor([row + more])).logits[0, len(row) - 1 : -1]
        gaps.append((scores.amax(-1) - scores.gather(-1, torch.tensor(more)[:, None])[:, 0]).max().item())
    return max(gaps)


def test_a_latent_has_one_kind_of_cache(forms: Forms) -> None:
    """`-ctk q8_0` alone is refused by llama.cpp, which reads V from K; it needs `-ctv q8_0` too."""
    with (
        pytest.raises(LlamaServerError, match="does not support different K .* and V .* cache types"),
        LlamaServer(PROGRAM, forms.gguf(narrow(forms), "f16"), "-ctk", "q8_0"),
    ):
        pass


def test_the_report_of_an_export_tells_the_cache(cli: Cli, forms: Forms) -> None:
    """The bytes of the report are those that llama.cpp makes."""
    words = ("--to", "auto", "--for", "llama.cpp", "--dry-run", "--json", "--quiet")
    told = cli("export", narrow(forms), *words)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["kv_bytes_per_token"] == (128 + 64) * LAYERS * BYTES["f16"]


def test_serve_runs_llama_server(cli: Cli, forms: Forms, tmp_path: Path) -> None:
    """`mhconvert serve` exports, and one chat request is answered."""
    (tmp_path / "llama-server").symlink_to(PROGRAM)
    port, output, log = llama_server.free_port(), tmp_path / "served.gguf", tmp_path / "log"
    command = [sys.executable, "-m", "mhconvert.cli.main", "serve", narrow(forms)]
    command += ["--engine", "llama-server", "-o", output, "--port", port]
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    with log.open("wb") as said:
        process = subprocess.Popen([*map(str, command)], stdout=said, stderr=said, env=environment)
    try:
        llama_server.wait_for(port, process, log)
        asked = {"messages": [{"role": "user", "content": "Water boils"}], "max_tokens": 4}
        answer = llama_server.request(port, "/v1/chat/completions", asked)
        in_use = cli("serve", output, "--port", port, PATH=environment["PATH"])
    finally:
        process.terminate()
        process.wait(30)
    assert answer["usage"]["completion_tokens"] > 0
    assert in_use.returncode == 1
    assert "choose another --port" in in_use.stderr


@pytest.mark.parametrize("layers", [1, 26, 27])  # llama.cpp guesses from some numbers of layers
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_numbers_of_layers_change_nothing(tmp_path: Path, layers: int, kind: str) -> None:
    dense = deepseek2.make_dense(tmp_path / "tiny", num_hidden_layers=layers)
    gguf_writer.write(dense, tmp_path / "tiny.gguf", kind)
    (row,) = prompts()[1:2]
    expected, _ = in_transformers(dense, [row], 1)
    with LlamaServer(PROGRAM, tmp_path / "tiny.gguf") as server:
        found = torch.tensor(server.score(row, VOCAB))
    assert (found - expected[0]).abs().max() < (1e-1 if kind == "bf16" else 3e-2)


@pytest.mark.parametrize("pre", WRITTEN)
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, pre: str) -> None:
    dense, file = deepseek2.make_dense(tmp_path / "tiny"), tmp_path / "tiny.gguf"
    tokenizer = save_tokenizer(dense, pre)
    gguf_writer.write(dense, file, "q8_0")
    with LlamaServer(PROGRAM, file) as server:
        asked = {"add_special": True, "parse_special": True}
        for text in (f"<|bos|>{text}<|eos|>" for text in TEXTS):
            made = server.post("/tokenize", asked | {"content": text})["tokens"]
            assert made == tokenizer(text).input_ids
        told = server.get("/props")
    assert (told["bos_token"], told["eos_token"]) == ("<|bos|>", "<|eos|>")


def test_smollm2(cli: Cli, data: Path, tmp_path: Path, engines: EnginesTable) -> None:
    """SmolLM2's own weights, where they are on this machine: the file that is written is the checkpoint."""
    small, file = tmp_path / "small", tmp_path / "small.gguf"
    words = ("--to", "mla", "--profile", "portable", "--kv-budget", 0.5, "--effort", "quick")
    words += ("--calibration", data / "calib/classic-books.jsonl")
    made = cli("smollm2-135m", *words, "--calibration-tokens", 2048, "-o", small, "--quiet")
    if made.returncode:
        pytest.skip(f"there is no SmolLM2 here: {made.stderr.strip()[-200:]}")
    done = cli("export", small, "--to", "gguf", "--kind", "q8_0", "-o", file, "--quiet")
    assert done.returncode == 0, done.stderr
    with open(data / "eval/wikitext2/wiki.test.raw", encoding="utf-8") as lines:
        row = AutoTokenizer.from_pretrained(small)(lines.read(4000)).input_ids[:64]
    expected, _ = in_transformers(small, [row])
    with LlamaServer(PROGRAM, file, "-c", CELLS) as server:
        found = torch.tensor(server.score(row, 49152))
        made_text, cache = server.greedy(row, NEW_TOKENS), server.cache
    worst = (found - expected[0]).abs().max().item()
    of_text = perplexity([found]) / perplexity(expected) - 1
    gap = below_best(small, [row], [made_text])
    assert worst < EIGHT_BITS.scores
    assert abs(of_text) < EIGHT_BITS.perplexity
    assert gap < 2 * EIGHT_BITS.scores
    planned, donor = 30 * (128 + 64), 30 * 2 * 3 * 64
    assert cache.bytes == pytest.approx(planned * BYTES["f16"], abs=0.02 * 2**20 / CELLS)
    told = {"difference": worst, "perplexity": of_text, "cache": round(planned * BYTES["f16"])}
    name = "SmolLM2-135M-Instruct, gguf (deepseek2), row 128 + 64, q8_0, cache f16"
    engines.add(name, llama_server.about(PROGRAM), command=COMMAND, **told, share=planned / donor)


def test_a_missing_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(LlamaServerError, match="is no llama-server that runs"):
        llama_server.about(str(tmp_path / "nothing"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(LlamaServerError, match="did not start"),
        LlamaServer(PROGRAM, tmp_path / "broken.gguf"),
    ):
        pass
