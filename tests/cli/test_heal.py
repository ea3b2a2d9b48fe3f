"""`mhconvert heal` and `--heal`: usage, one JSON object, Ctrl-C and --resume, and a conversion healed in place."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from mhconvert import api
from mhconvert.convert.calibration.calibration_rows import Rows
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe, load_recipe, save_recipe
from mhconvert.errors import MhconvertError
from mhconvert.heal.metrics import read
from tests.conftest import Cli, Interrupted, Main
from tests.donors import TEXT, make_checkpoint, make_donor

HEALING = ("--sequence-length", 32, "--batch-tokens", 256, "--held-out", 2, "--epochs", 99, "--device", "cpu")
CONVERSION = (
    "--to",
    "mla",
    "--kv-bits",
    16,
    "--effort",
    "quick",
    "--kv-budget",
    0.4,
    "--calibration-tokens",
    512,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("converted") / "ckpt")


@pytest.fixture(scope="module")
def donor(checkpoint: Path) -> Path:
    return checkpoint.parent / "donor"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 120, encoding="utf-8")
    return file


def test_a_checkpoint_is_healed(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cli("heal", checkpoint, "--tokens", "1k", "--data", text, *HEALING, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kl"] < report["before"]["kl"]
    assert report["healing"]["trained_tokens"] == 1024
    assert "healing, tokens 1,024/1,024 · loss " in done.stderr
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| KL from the donor | 0 |" in card
    assert "healing.svg" in card
    assert (out / "healing.svg").stat().st_size > 1000
    shown = cli("inspect", out)
    assert shown.returncode == 0, shown.stderr


def test_records_without_text_are_skipped_and_counted(here: Cli, checkpoint: Path, tmp_path: Path) -> None:
    records = [{"text": TEXT}] * 20 + [{"text": None}, {"body": "x"}] + [{"text": TEXT}] * 20
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    words = (
        "heal",
        checkpoint,
        "--tokens",
        256,
        "--data",
        file,
        *HEALING,
        "-o",
        tmp_path / "out",
        "--no-verify",
    )
    refused = here(*words)
    assert refused.returncode == 1
    assert "some.jsonl, line 21: no text in 'text', " in refused.stderr
    assert "; 'text' is null" in refused.stderr
    done = here(*words, "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healing"]["skipped_records"] == {str(file): 2}
    assert "reading text · 2 records without text were skipped" in done.stderr


def test_ctrl_c_and_resume(
    interrupted: Interrupted, here: Cli, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    words = (
        "heal",
        checkpoint,
        "--tokens",
        "5k",
        "--save-tokens",
        512,
        "--data",
        text,
        *HEALING,
        "--no-verify",
    )
    code, said = interrupted("healing, tokens 1,", *words, "-o", tmp_path / "out")
    assert code == 130
    assert "interrupted; the same command with --resume continues after the last durable checkpoint" in said
    done = here(*words, "-o", tmp_path / "out", "--resume")
    assert done.returncode == 0, done.stderr
    steps = [entry["step"] for entry in read(tmp_path / "out" / "metrics.jsonl") if "loss" in entry]
    assert steps == list(range(1, 21))
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say how much to heal on"),
        (("--tokens", "much"), "tokens 'much' is not a number of tokens"),
        (("--tokens", "1k", "--loss", "mse"), "loss has no term 'mse'"),
        (("--tokens", "1k", "--on-policy-loss", "0.5"), "--on-policy-loss is of --on-policy: give that too"),
        (
            ("--layer-tokens", "1k", "--on-policy", "0.5"),
            "--on-policy is of --tokens, and --layer-tokens alone",
        ),
    ],
)
def test_usage(words: tuple[str, ...], message: str, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("heal", "ckpt", *words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_shares_of_sources_are_read_from_words(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HealSettings] = []
    monkeypatch.setattr(api, "heal", lambda _, settings, **__: asked.append(settings) or {})
    assert main("heal", "ckpt", "--tokens", "1k", "--data", "a.txt=2", "--data", "self") == 0
    assert asked[0].data == {"a.txt": 2.0, "self": 1.0}


def test_what_is_no_checkpoint(main: Main, donor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("heal", donor, "--tokens", "1k", "--json") == 1
    assert "is not a checkpoint that mhconvert wrote" in json.loads(capsys.readouterr().out)["error"]


def test_a_conversion_heals_its_result_in_place(here: Cli, donor: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (donor, *CONVERSION, "--calibration", text, "--sequence-length", 64, "-o", out, "--heal", "4k")
    done = here(*words, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["healing"]["trained_tokens"] == 4096
    assert report["kl"] < report["before"]["kl"]
    assert json.loads((out / "mhconvert.json").read_text())["healed"]
    assert not (tmp_path / "out.partial").exists()


def test_a_recipe_with_healing(
    donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is YAML and back; a run that ended between its two stages goes on with the second."""
    recipe = Recipe(
        model=str(donor),
        method="mla",
        settings=MLASettings(kv_budget=0.4, kv_bits="16"),
        effort="quick",
        output=str(tmp_path / "out"),
        calibration=Calibration((str(text),), tokens=512, sequence_length=64, held_out=2),
        verify=False,
        heal=HealSettings(
            tokens=512,
            data={str(text): 1.0},
            sequence_length=32,
            batch_tokens=256,
            held_out=2,
            epochs=99,
            skip_bad=True,
        ),
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe

    with monkeypatch.context() as dark:
        dark.setattr("mhconvert.heal.heal_text.prepare", broken)
        with pytest.raises(MhconvertError, match="the lights went out"):
            api.convert(recipe)
    report = api.convert(recipe, resume=True)
    assert report["healing"]["steps"] == 2
    assert load_recipe(tmp_path / "out" / "recipe.yaml").output == recipe.output


def test_the_text_of_healing_is_looked_for_before_the_conversion(donor: Path, tmp_path: Path) -> None:
    heal = HealSettings(tokens=512, data={str(tmp_path / "absent.txt"): 1.0})
    with pytest.raises(MhconvertError, match=r"absent\.txt cannot be read: there is no such file"):
        api.convert(Recipe(str(donor), "mla", output=str(tmp_path / "out"), heal=heal))
    assert not list(tmp_path.iterdir())


def broken(*_: object, **__: object) -> Rows:
    raise MhconvertError("the lights went out")


def folders(place: Path) -> set[str]:
    return {path.name for path in place.iterdir()}


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("layers 1/2", "out.unhealed.partial"),
        ("reading text", "out.unhealed"),
        ("healing, tokens 1,", "out.unhealed"),
    ],
)
def test_a_result_that_is_not_healed_never_has_the_name_of_one_that_is(
    interrupted: Interrupted,
    here: Cli,
    donor: Path,
    text: Path,
    tmp_path: Path,
    line: str,
    left: str,
) -> None:
    """Killed while converting, between the stages, and while healing; --resume then gives the healed result."""
    out = tmp_path / "out"
    words = (donor, *CONVERSION, "--calibration", text, "--sequence-length", 64, "-o", out, "--heal", "3k")
    code, _ = interrupted(line, *words, "--no-verify", by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert left in folders(tmp_path)
    assert "out" not in folders(tmp_path)
    again = here(*words, "--no-verify")
    assert again.returncode == 1
    assert f"{tmp_path / left} holds" in again.stderr
    assert "--force starts over" in again.stderr
    done = here(*words, "--no-verify", "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["healing"]["trained_tokens"] == 3072
    [healed] = json.loads((out / "mhconvert.json").read_text())["healed"]
    assert healed["checkpoint"] == str(out)  # not OUT.unhealed, which is gone
    assert not any(b"unhealed" in file.read_bytes() for file in out.iterdir())
    assert folders(tmp_path) == {"out"}


def test_a_run_killed_before_the_unhealed_folder_is_gone(
    here: Cli, donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume deletes what is left, and gives the report of the healed folder; somebody else's folder stays."""
    out, left = tmp_path / "out", tmp_path / "out.unhealed"
    words = (donor, *CONVERSION, "--calibration", text, "--sequence-length", 64, "-o", out, "--heal", "1k")
    with monkeypatch.context() as killed:
        killed.setattr("mhconvert.convert.storage.step_folder.remove_step", lambda _: None)
        first = here(*words, "--no-verify", "--json")
    assert folders(tmp_path) == {"out", "out.unhealed"}
    weights = (out / "model.safetensors").read_bytes()
    for file in left.iterdir():  # half of it is deleted
        if file.name not in (".mhconvert", "config.json"):
            file.unlink()
    done = here(*words, "--no-verify", "--resume", "--json")
    assert json.loads(done.stdout) == json.loads(first.stdout)
    assert folders(tmp_path) == {"out"}
    assert (out / "model.safetensors").read_bytes() == weights

    other = here(*words[:-1], "2k", "--no-verify", "--resume")  # of another length of healing
    assert other.returncode == 1
    assert f"{out} exists" in other.stderr

    left.mkdir()
    (left / "config.json").write_text("{}")
    refused = here(*words, "--no-verify", "--force")
    assert refused.returncode == 1
    assert "out.unhealed is not the work of mhconvert" in refused.stderr
    assert (left / "config.json").read_text() == "{}"


def test_an_adapter_is_not_healed_by_a_conversion(
    main: Main, donor: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(donor, "--to", "hydra", "--heal", "1k") == 2
    assert "--heal does not apply to hydra" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_hydra_adapter_is_trained(here: Cli, donor: Path, text: Path, tmp_path: Path) -> None:
    """`--to hydra`, `heal --train hydra`, `merge`: a text is learnt, and the base is as it was."""
    adapter, trained = tmp_path / "adapter", tmp_path / "trained"
    assert here(donor, "--to", "hydra", "--r-par", 2, "--r-seq", 2, "-o", adapter).returncode == 0
    words = (
        "--train",
        "hydra",
        "--tokens",
        "4k",
        "--lr",
        0.01,
        "--data",
        text,
        *HEALING,
        "-o",
        trained,
        "--json",
    )
    refused = here("heal", adapter, *words)
    assert refused.returncode == 1
    assert "has nothing to learn from it: teach it the text with --loss ce" in refused.stderr
    done = here("heal", adapter, "--loss", "ce", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    learnt, before = report["perplexity"]["converted"], report["before"]["perplexity"]["converted"]
    assert before == pytest.approx(report["perplexity"]["donor"], rel=1e-6)
    assert learnt < 0.7 * before
    names = {file.name for file in trained.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "metrics.jsonl"} <= names
    assert "model.safetensors" not in names
    merged = here("merge", trained, "-o", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    judged = here(
        "eval", tmp_path / "merged", "--against", donor, "--text", text, "--sequence-length", 32, "--json"
    )
    before, after = (model["perplexity"] for model in json.loads(judged.stdout)["texts"][0]["models"])
    assert after < 0.7 * before


def test_heads_are_fused_in_two_rounds(here: Cli, text: Path, tmp_path: Path) -> None:
    """A conversion that leaves its heads apart, then 2 ×, then 2 ×: the three commands in docs/methods/dha.md."""
    source = make_donor(tmp_path / "donor", heads=4, kv_heads=4)
    words = (
        *("--to", "dha", "--kv-budget", 0.25, "--fusion", "trained", "--calibration", text),
        *("--calibration-tokens", 512, "--sequence-length", 32, "--device", "cpu", "--no-verify"),
    )
    assert here(source, *words, "-o", tmp_path / "apart", "-q").returncode == 0
    unasked = here(
        "heal", tmp_path / "apart", "--tokens", "1k", "--data", text, *HEALING, "-o", tmp_path / "no"
    )
    assert unasked.returncode == 1
    assert "with --fusion 2" in unasked.stderr
    begun, widths = tmp_path / "apart", []
    for name in ("half", "quarter"):
        healing = ("--tokens", "4k", "--fusion", 2, "--data", text, *HEALING)
        done = here("heal", begun, *healing, "-o", tmp_path / name, "--json")
        assert done.returncode == 0, done.stderr
        begun = tmp_path / name
        widths.append(json.loads(done.stdout)["verified"]["cache"]["elements_per_token"])
    assert widths == [2 * 2 * 2 * 16, 2 * 2 * 16]  # two layers, K and V, two heads and then one
    again = here(
        "heal", begun, "--tokens", "1k", "--fusion", 2, "--data", text, *HEALING, "-o", tmp_path / "no"
    )
    assert again.returncode == 1
    assert "no heads that are to be fused" in again.stderr


def test_a_resumed_run_notices_another_tolerance(
    here: Cli, donor: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the conversion that was finished before its healing was killed, and of a healed one before it was told."""
    out = tmp_path / "out"
    searched = [word for word in CONVERSION if word not in ("--kv-budget", 0.4)]
    words = [
        donor,
        *searched,
        "--calibration",
        text,
        "--sequence-length",
        64,
        "-o",
        out,
        "--heal",
        "1k",
        "--no-verify",
    ]
    with monkeypatch.context() as killed:
        killed.setattr("mhconvert.heal.heal_text.prepare", lambda *_: 1 / 0)
        assert here(*words, "--tolerance", "kl=2").returncode == 1
    assert folders(tmp_path) == {"out.unhealed"}
    other = here(*words, "--tolerance", "kl=3", "--resume")
    assert other.returncode == 1
    assert "out.unhealed" in other.stderr
    assert "tolerance" in other.stderr
    with monkeypatch.context() as killed:
        killed.setattr("mhconvert.convert.storage.step_folder.remove_step", lambda _: None)
        first = here(*words, "--tolerance", "kl=2", "--resume", "--json")
    assert first.returncode == 0, first.stderr
    assert here(*words, "--tolerance", "kl=3", "--resume").returncode == 1
    assert json.loads(here(*words, "--tolerance", "kl=2.0", "--resume", "--json").stdout) == json.loads(
        first.stdout
    )


@pytest.mark.parametrize(
    ("fusion", "said"),
    [(("--fusion", "trained"), "give heal.fusion: 2"), ((), None)],
    ids=["trained", "closed"],
)
def test_heads_that_healing_does_not_fuse_are_refused_before_the_conversion(
    here: Cli, donor: Path, text: Path, tmp_path: Path, fusion: tuple[str, ...], said: str | None
) -> None:
    words = (donor, "--to", "dha", *fusion, "--calibration", text, "--heal", "1k", "-o", tmp_path / "out")
    if said is None:
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"model: {donor}\nmethod: dha\noutput: {tmp_path / 'out'}\nheal: {{tokens: 1k, fusion: 2}}\n"
        )
        words, said = ("run", recipe), "give settings.fusion: trained"
    done = here(*words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "layers" not in done.stderr.partition("mhconvert: ")[0]
    assert not (tmp_path / "out.unhealed").exists()


def test_a_donor_that_is_here_has_no_folder_inside_of_it(
    here: Cli, donor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(donor)
    done = here(".", "--to", "dha")
    assert done.returncode == 1
    assert f"{donor.name}-dha is inside ., which is only read; choose another folder with -o" in done.stderr
