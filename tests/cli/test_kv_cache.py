"""`--kv-cache-dtype` and `curve --baselines` as a user runs them: figures of a tiny donor and of its conversions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mhconvert import api
from mhconvert.convert.recipe.recipe import Recipe
from mhconvert.errors import MhconvertError
from mhconvert.eval.settings import EvalSettings
from tests.conftest import Cli, Main
from tests.donors import TEXT, make_donor

CALIBRATION = [
    "--calibration-tokens",
    512,
    "--sequence-length",
    64,
    "--device",
    "cpu",
    "--effort",
    "quick",
    "--quiet",
]
ROWS = ["--sequences", "2", "--sequence-length", "128", "--quiet", "--json"]
SHARES = {"int8": 9 / 16, "fp8": 8 / 16, "int4": 5 / 16, "int3": 4 / 16, "int2": 3 / 16}

Convert = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a donor of head_dim 32, stored in float32, and a text."""
    folder = tmp_path_factory.mktemp("kv_cache")
    make_donor(folder / "tiny", heads=2, kv_heads=2, hidden=64)
    (folder / "text.txt").write_text(TEXT * 30, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def convert(place: Path) -> Convert:
    """Converts the donor once for each set of words; the folder."""

    def run(name: str, **settings: Any) -> Path:
        folder = place / name
        if not folder.exists():
            calibration = {"sources": str(place / "text.txt"), "tokens": 512, "sequence_length": 64}
            more = {"calibration": calibration, "effort": "quick", "verify": False, "device": "cpu"}
            method = settings.pop("method")
            whole = {
                "model": str(place / "tiny"),
                "method": method,
                "output": str(folder),
                "settings": settings,
            }
            api.convert(Recipe.from_dict(whole | (more if method != "hydra" else {})))
        return folder

    return run


def printed(main: Main, capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """What a command prints with --json."""
    assert main(*words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_curve_beside_its_rivals(cli: Cli, place: Path) -> None:
    files = [place / "curve.json", place / "curve.svg"]
    done = cli(
        *("curve", place / "tiny", "--to", "mla", "--kv-bits", 16, "--budgets", "0.5,0.25", "--baselines"),
        *("--calibration", place / "text.txt", *CALIBRATION, "-o", files[0], "-o", files[1]),
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(files[0].read_text(encoding="utf-8"))
    rivals = {point["kv_cache_dtype"]: point for point in result["baselines"]}
    assert list(rivals) == ["int8", "int4", "int3", "int2"]
    assert {name: point["kv_share"] for name, point in rivals.items()} == {n: SHARES[n] for n in rivals}
    assert [point["kv_share"] for point in result["points"]] == [0.5, 0.25]
    assert rivals["int4"]["kv_bytes_per_token"] == 2 * 2 * 64 * 5 / 8  # layers, keys and values
    divergences = [point["kl"] for point in rivals.values()]
    assert divergences == sorted(divergences)
    assert divergences[0] < 1e-3 < divergences[3]
    for point in rivals.values():  # the same donor on the same rows, once layer by layer and once as a whole
        assert point["perplexity"]["donor"] == pytest.approx(result["perplexity"], rel=1e-5)
    assert "KV cache in % of the bytes of the donor's cache at 16 bits an element" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "donor int4" in line)
    assert [word.strip() for word in row.split("│")[2:4]] == ["31.2 %", "160 B"]
    assert "donor, quantised cache" in files[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("bits", ["auto", "8"])
def test_shares_of_coded_latents_are_of_16_bits_too(
    main: Main, capsys: pytest.CaptureFixture[str], place: Path, bits: str
) -> None:
    """The donor is stored in float32, whose bytes are twice those that the budget is a share of."""
    words = ["curve", place / "tiny", "--to", "mla", "--kv-bits", bits, "--budgets", "0.25", "--json"]
    words += ["--text", place / "text.txt", "--sequences", 2, "--kv-cache-dtype", "fp8"]
    result = printed(main, capsys, *words, "--calibration", place / "text.txt", *CALIBRATION)
    [point], [rival] = result["points"], result["baselines"]
    assert result["fit_steps"] == 0  # whatever the effort: the closed form is the result
    assert 0.2 < point["kv_share"] <= 0.25
    assert point["kv_share"] == point["kv_bytes_per_token"] / (2 * result["kv_elements_per_token"])
    assert (rival["name"], rival["kv_share"]) == ("donor fp8", 0.5)
    assert rival["perplexity"]["donor"] == pytest.approx(result["perplexity"], rel=1e-5)


@pytest.mark.parametrize("dtype", SHARES)
def test_the_donor_beside_itself(
    main: Main, capsys: pytest.CaptureFixture[str], place: Path, dtype: str
) -> None:
    words = ["eval", place / "tiny", "--text", place / "text.txt", "--kv-cache-dtype", dtype, *ROWS]
    result = printed(main, capsys, *words)
    assert [model["name"] for model in result["models"]] == ["tiny", f"tiny {dtype}"]
    assert [model["kv_cache_dtype"] for model in result["models"]] == ["auto", dtype]
    own, coded = result["texts"][0]["models"]
    assert own["kl"] == 0 < coded["kl"] < 1
    sizes = [cache["kv_elements_per_token"] for cache in result["cache"]]
    assert sizes == [256, 256 * SHARES[dtype]]
    # Nothing is taken from the other's stored results.
    plain = printed(main, capsys, *words[:4], *ROWS, "--against", place / "tiny")
    assert plain["texts"][0]["models"] == [own]


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("mla", {"method": "mla", "kv_bits": 16, "kv_budget": 0.5}, 5 / 16),
        ("dha", {"method": "dha", "kv_budget": 0.5}, 5 / 16),
        ("moh", {"method": "moh"}, 5 / 16),
        ("hydra", {"method": "hydra"}, 5 / 16),
    ],
)
def test_conversions(
    main: Main,
    capsys: pytest.CaptureFixture[str],
    place: Path,
    convert: Convert,
    name: str,
    settings: dict[str, Any],
    share: float,
) -> None:
    """Each conversion with its own cache and with int4 codes, and the text that it generates."""
    folder = convert(name, **settings)
    words = ["eval", folder, "--text", place / "text.txt", *ROWS]
    own = printed(main, capsys, *words)
    coded = printed(main, capsys, *words, "--kv-cache-dtype", "int4", "--retrieval")
    sizes = [each["cache"][1]["kv_elements_per_token"] for each in (own, coded)]
    assert sizes[1] / sizes[0] == pytest.approx(share)
    own_kl, coded_kl = (each["texts"][0]["models"][1]["kl"] for each in (own, coded))
    assert coded_kl > own_kl - 0.05
    assert coded_kl != own_kl
    assert coded["models"][1]["name"] == f"{name} int4"
    assert len(coded["retrieval"]["models"]) == 2
    made = printed(
        main,
        capsys,
        "generate",
        folder,
        "The boats",
        "--kv-cache-dtype",
        "int4",
        "--json",
        "--max-new-tokens",
        70,
    )
    assert made["kv_cache_dtype"] == "int4"
    assert made["new_tokens"] == 70
    assert made["kv_bytes_per_token"] < 0.6 * 4 * sizes[0]  # keys that wait for their group are float32


def test_bench_times_the_donor_against_itself(
    main: Main, capsys: pytest.CaptureFixture[str], place: Path, convert: Convert
) -> None:
    words = ["--kv-cache-dtype", "int2", "--contexts", 64, "--batch", 2, "--new-tokens", 2, "--quiet"]
    result = printed(main, capsys, "bench", place / "tiny", *words, "--json")
    [row] = result["rows"]
    assert result["against"] == result["checkpoint"] == str(place / "tiny")
    assert row["donor"]["cache_bytes"] == 2 * 64 * 256 * 4
    assert row["cache_ratio"] == 3 / 32  # of float32
    latent = convert("mla", method="mla", kv_bits=16, kv_budget=0.5)
    assert main("bench", latent, *words, "--reexpand") == 0
    assert "of 16-bit bytes they are twice the share" in capsys.readouterr().out
    assert main("bench", latent, *words, "--static-cache") == 1
    assert "int2 caches grow; no --static-cache" in capsys.readouterr().err


def test_a_coded_checkpoint_is_refused(
    main: Main, capsys: pytest.CaptureFixture[str], place: Path, convert: Convert
) -> None:
    folder = convert("coded", method="mla", kv_bits="auto", kv_budget=0.25)
    said = f"mhconvert: {folder} caches codes already (kv_bits), not keys and values, so --kv-cache-dtype int4 has"
    for words in (
        ["eval", folder, "--text", place / "text.txt", *ROWS[:-1]],
        ["generate", folder, "The boats"],
        ["bench", folder, "--contexts", 64, "--batch", 1, "--quiet"],
    ):
        assert main(*words, "--kv-cache-dtype", "int4") == 1
        assert said in capsys.readouterr().err


def test_other_refusals(main: Main, capsys: pytest.CaptureFixture[str], place: Path) -> None:
    for command in ("eval", "generate", "bench"):
        assert (
            main(command, place / "tiny", *(["x"] * (command == "generate")), "--kv-cache-dtype", "int5") == 2
        )
        assert "is not one of auto, int8, int4, int3, int2, fp8" in capsys.readouterr().err
    with pytest.raises(MhconvertError, match="kv_cache_dtype 'int5' is not one of auto, int8"):
        api.generate(str(place / "tiny"), "x", kv_cache_dtype="int5")
    make_donor(place / "chunked", family="llama", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(MhconvertError, match="layers of the kind chunked_attention"):
        api.generate(str(place / "chunked"), "x", kv_cache_dtype="int4")


def test_nan_keys_are_not_silent(place: Path) -> None:
    """A donor whose keys overflow: its perplexity is no number, with every cache."""
    from mhconvert.convert.open_model import open_model
    from mhconvert.eval.kv_cache.serving import cached_forward

    model = open_model(str(place / "tiny"), device="cpu").model()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3] = torch.nan
    ids = torch.arange(2, 102)[None]
    for dtype in SHARES:
        with torch.inference_mode():
            assert bool(cached_forward(model, dtype)(ids).logits.isnan().any())


def test_lm_eval_asks_the_model_with_the_cache(place: Path) -> None:
    settings = EvalSettings(suite="quick", limit=2, kv_cache_dtype="int2")
    result = api.evaluate(str(place / "tiny"), settings, device="cpu")
    own, coded = result["tasks"][0]["metrics"][0]["models"]
    assert own["value"] is not None
    assert coded["difference"] is not None
    assert [model["kv_cache_dtype"] for model in result["models"]] == ["auto", "int2"]


def test_a_report_does_not_take_bytes_of_another_cache(main: Main, place: Path, convert: Convert) -> None:
    """`report.json` has the bytes of the checkpoint's own cache."""
    folder, page = convert("mla", method="mla", kv_bits=16, kv_budget=0.5), place / "page.md"
    words = ["eval", folder, "--text", place / "text.txt", *ROWS[:-1], "--report", page]
    assert main(*words) == 0
    assert "| mla | 128 | 50 % | 512 B |" in page.read_text(encoding="utf-8")
    assert main(*words, "--kv-cache-dtype", "int4") == 0
    assert "| mla int4 | 40 | 15.6 % | — |" in page.read_text(encoding="utf-8")
