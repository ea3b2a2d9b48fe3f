"""The Triton kernel reads a cache of codes as torch does. Triton interprets it here; no GPU has run it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mhconvert
from mhconvert.convert.methods.mla.code_levels import normal_levels
from mhconvert.convert.methods.mla.latent_code import NOT_FINITE, SINK, WIDTHS
from mhconvert.convert.methods.mla.modeling_coded_mla import CodedLatentAttention
from mhconvert.convert.methods.mla.settings import MLASettings
from tests.convert.conversions import donor_model, relative, token_ids
from tests.convert.methods.mla.coded_models import coded

pytest.importorskip("triton", reason="triton is not installed; it has wheels for Linux only")

# Sums in another order, and other roundings of keys and scores. Triton's interpreter cuts bf16 off, a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
COUNTS = [3, 2, 1, 5, 7, 4, 9, 11]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHCONVERT_TRITON", "1")


def layer(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, counts: list[int] = COUNTS) -> Any:
    """A random layer, as wide as its components need not be."""
    config: Any = type("Config", (), {})()
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = heads, kv_heads, head_dim
    config.hidden_size, config.softmax_scale, config.attention_softcap = 32, None, None
    config.attention_dropout, config.qk_norm = 0.0, None
    config.attention_input_bias = config.attention_output_bias = False
    config.layer_window, config.layer_counts = lambda _: None, lambda _: counts
    torch.manual_seed(0)
    made = CodedLatentAttention(config, 0)
    made.code.levels.copy_(torch.cat([normal_levels(width) for width in WIDTHS]))
    made.code.sink.fill_(3.0)
    return made.to(dtype).eval().requires_grad_(False)


def inputs(made: Any, batch: int, length: int, seen: int, width: int) -> tuple[Tensor, Tensor, Any]:
    """Queries, rows of the cache, of which the first is a sink, and (cos, sin)."""
    generator = torch.Generator().manual_seed(1)
    dtype = made.kv_b_proj.weight.dtype
    query = torch.randn(batch, made.num_heads, length, made.head_dim, generator=generator).to(dtype)
    z = torch.randn(batch, 1, seen, sum(COUNTS), generator=generator)
    z[:, :, 0] = 3.0 + 0.1 * z[:, :, 0]
    angles = torch.arange(seen).unsqueeze(-1) / 10 ** torch.linspace(0, 3, width // 2)
    angles = torch.cat((angles, angles), -1).unsqueeze(0)
    return 3 * query, made.code.encode(z), (angles.cos().to(dtype), angles.sin().to(dtype))


def both(made: Any, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What the kernel and what torch give, in fp32."""
    calls = spied(monkeypatch)
    found = made.read_in_blocks(*arguments)
    assert calls == [1]
    monkeypatch.setenv("MHCONVERT_TRITON", "0")
    expected = made.read_in_blocks(*arguments)
    assert calls == [1]
    return found.float(), expected.float()


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each call of the kernel."""
    from mhconvert.convert.methods.mla import coded_kernel

    calls, real = [], coded_kernel.latent_mean
    monkeypatch.setattr(coded_kernel, "latent_mean", lambda *a: (calls.append(1), real(*a))[1])
    return calls


def mask_of(kind: str, batch: int, heads: int, length: int, seen: int, dtype: torch.dtype) -> Tensor | None:
    """Causal, and left padding of 70 slots, more than a tile, in the last sequence."""
    slots = torch.arange(seen)
    visible = slots <= (torch.arange(length) + seen - length).unsqueeze(-1)
    visible = visible.expand(batch, 1, length, seen).clone()
    visible[-1, ..., :70] = False
    if kind == "bool":
        return visible
    if kind == "heads":
        visible = visible.repeat(1, heads, 1, 1)
        visible[:, 0, :, 80:90] = False
    lowest = -torch.inf if kind == "infinite" else torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, lowest)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "width", "length", "kind"),
    [
        (4, 4, 16, 16, 1, None),
        (9, 3, 16, 16, 1, "added"),
        (6, 2, 20, 12, 3, "bool"),
        (4, 2, 16, 16, 32, "heads"),
        (4, 2, 160, 160, 2, "infinite"),
    ],
    ids=["heads", "groups", "partial-rotary", "many-queries", "programs"],
)
def test_the_kernel_is_the_torch_path(
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    length: int,
    kind: str | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = layer(heads, kv_heads, head_dim, dtype)
    query, rows, of_keys = inputs(made, 2, length, 200, width)  # 200: the last tile is not full
    assert (rows[:, 0, :, 0] >= SINK).sum(1).tolist() == [1, 1]
    mask = None if kind is None else mask_of(kind, 2, heads, length, 200, dtype)
    found, expected = both(made, monkeypatch, query, rows, of_keys, mask)
    assert expected.isfinite().all()
    assert relative(found, expected) < TOLERANCE[dtype]


def test_parts_of_several_tiles_and_a_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 programs at once: 1,100 rows of two sequences are three parts of three tiles, and more."""
    made = layer(4, 2, 16, torch.float32)
    plain = made.read_in_blocks(*inputs(made, 2, 1, 1100, 16), None)
    made.softcap = 2.0
    found, expected = both(made, monkeypatch, *inputs(made, 2, 1, 1100, 16), None)
    assert relative(found, expected) < TOLERANCE[torch.float32]
    assert relative(found, plain) > 0.01


def test_rows_that_are_part_of_a_larger_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides of a static cache, a mask that is longer, and angles of each sequence."""
    made = layer(4, 2, 16, torch.float32)
    query, rows, (cos, sin) = inputs(made, 2, 2, 150, 16)
    kept = torch.zeros(2, 1, 300, rows.shape[-1], dtype=torch.uint8)
    kept[:, :, :150] = rows
    of_keys = (cos.repeat(2, 1, 1), sin.repeat(2, 1, 1))
    mask = mask_of("bool", 2, 4, 2, 150, torch.float32)
    longer = torch.nn.functional.pad(mask, (0, 150))
    found, _ = both(made, monkeypatch, query, kept[:, :, :150], of_keys, longer)
    expected = made.read_in_blocks(query, rows, of_keys, mask)
    assert relative(found, expected) < TOLERANCE[torch.float32]


def test_a_token_that_is_not_finite_spreads_in_its_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(4, 2, 16, torch.float32)
    query, rows, of_keys = inputs(made, 2, 1, 100, 16)
    rows[0, 0, 5, 0] = NOT_FINITE
    found, expected = both(made, monkeypatch, query, rows, of_keys, None)
    assert found[0].isnan().all()
    assert expected[0].isnan().all()
    assert relative(found[1], expected[1]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["llama", "gemma2", "stablelm", "qwen3"])
def test_models_generate_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"sliding_window": 8} if family == "gemma2" else {}
    model, ids = coded(donor_model(family=family, **extra), 0.25), token_ids(2, 20)
    padding = torch.ones_like(ids)
    padding[0, :6] = 0
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    calls = spied(monkeypatch)
    found = model.generate(input_ids=ids, attention_mask=padding, **options)
    assert len(calls) == 4 * 2  # the prompt is short enough too; layers
    monkeypatch.setenv("MHCONVERT_TRITON", "0")
    expected = model.generate(input_ids=ids, attention_mask=padding, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert relative(torch.stack(found.logits), torch.stack(expected.logits)) < 2 * TOLERANCE[torch.float32]


def test_what_the_kernel_cannot_read_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, calls = layer(4, 2, 16, torch.float32), spied(monkeypatch)
    arguments = inputs(made, 1, 1, 70, 16)
    made.read_in_blocks(*arguments, None)
    assert len(calls) == 1
    made.kv_b_proj.requires_grad_(True)
    made.read_in_blocks(*arguments, None)
    monkeypatch.delenv("TRITON_INTERPRET")  # the tensors are a CPU's
    with torch.no_grad():
        made.read_in_blocks(*arguments, None)
    monkeypatch.setenv("MHCONVERT_TRITON", "0")
    assert len(calls) == 1
    assert set(made.code.state_dict()) == {"sink", "levels", "weight"}


GENERATE = """
import sys
sys.modules["mhconvert"] = None
import torch
from transformers import AutoModelForCausalLM
model, ids = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True), torch.arange(2, 22)[None]
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
print(*model.generate(input_ids=ids, **options)[0].tolist())
print(*(name for name in sys.modules if name.endswith("coded_kernel")))
"""


def test_a_saved_folder_brings_the_kernel_along(recipe: Any, tmp_path: Any) -> None:
    settings = MLASettings(kv_bits="auto", kv_budget=0.25)
    mhconvert.convert(dataclasses.replace(recipe(tmp_path / "out"), settings=settings))
    found = []
    for chosen in ("0", "1"):
        environment = os.environ | {"MHCONVERT_TRITON": chosen, "HF_MODULES_CACHE": str(tmp_path / "modules")}
        child = subprocess.run(
            [sys.executable, "-c", GENERATE, str(tmp_path / "out")],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        found.append(child.stdout.split("\n"))
    assert found[0][0] == found[1][0]
    assert [lines[1].split(".")[0] for lines in found] == ["", "transformers_modules"]


COMPILE = """
import json
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mhconvert.convert.methods.mla.coded_kernel import CHUNK, TILE, _partial_means as kernel
shared = {}
for dtype, tile, most in (("bf16", TILE, 64), ("fp32", TILE // 2, 16)):
    types = dict.fromkeys("query k_up k_mean cos sin mask gains levels".split(), f"*{dtype}")
    types |= {"rows": "*u8", "tables": "*i32"} | dict.fromkeys(("sums", "peaks", "totals"), "*fp32")
    constants = dict(P=2080, C=128, PAIRS=64, M=most, TILE=tile, CHUNK=CHUNK, SOFTCAP=30.0, MASK="added")
    constants |= dict(HIDDEN=-65504.0, EXACT=False)
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if name != "rows"}
    for capability in (80, 90):
        source, target = ASTSource(kernel, signature, places, aligned), GPUTarget("cuda", capability, 32)
        made = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 2})
        assert made.asm["cubin"]
        shared[f"{dtype} {capability}"] = made.metadata.shared
print(json.dumps(shared))
"""


def test_the_kernel_compiles_for_gpus(tmp_path: Any) -> None:
    """To machine code of two generations, without a device; the largest shapes are within their shared memory."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    shared = json.loads(child.stdout.splitlines()[-1])
    assert len(shared) == 4
    assert max(shared.values()) < 100 * 1024, shared
