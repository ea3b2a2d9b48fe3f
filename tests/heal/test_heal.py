"""Healing whole: a real checkpoint comes nearer, a run cut short goes on to the bit, two processes are as one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mhconvert import api
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.open_model import OpenModel
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import HealError, MhconvertError, OutputError
from mhconvert.eval.report.conversion_tables import healing_line
from mhconvert.heal import distill, resumable_run, write_result
from mhconvert.heal.metrics import read
from mhconvert.progress import Progress
from tests.donors import TEXT, make_checkpoint, make_donor, make_tokenizer

SMALL = {"sequence_length": 32, "batch_tokens": 256, "held_out": 2, "micro_batch": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [TEXT[start : start + 200] for start in range(0, 250, 2)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, converted; its donor is beside it."""
    return make_checkpoint(tmp_path_factory.mktemp("converted") / "ckpt")


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read(folder / "metrics.jsonl") if "loss" in entry]


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path, float], Path]:
    """The real checkpoint of a name, converted once on a text; only to be read."""
    kept: dict[str, Path] = {}

    def converted(name: str, text: Path, budget: float) -> Path:
        if name not in kept:
            kept[name] = tmp_path_factory.mktemp("real") / "ckpt"
            recipe = Recipe(
                model=str(data / "checkpoints" / name),
                method="mla",
                settings=MLASettings(kv_budget=budget, kv_bits="16"),
                effort="quick",
                output=str(kept[name]),
                calibration=Calibration((str(text),), tokens=2048, sequence_length=128),
            )
            api.convert(recipe)
        return kept[name]

    return converted


@pytest.mark.parametrize("train", ["attention", "lora"])
@pytest.mark.parametrize(
    ("name", "text", "budget", "factor"),
    [("stories260k-gqa", "classic-books.jsonl", 0.3, 1.25), ("poems750k-mha", "poems.jsonl", 0.15, 1.2)],
)
def test_a_real_checkpoint_is_healed(
    name: str,
    text: str,
    budget: float,
    factor: float,
    train: str,
    data: Path,
    real: Callable[[str, Path, float], Path],
    tmp_path: Path,
) -> None:
    """KL on rows it has not seen falls by a factor within seconds, and the folder is whole."""
    checkpoint = real(name, data / "calib" / text, budget)
    source, parts = {str(data / "calib" / text): 1.0}, {"batch_tokens": 512, "micro_batch": 4}
    settings = HealSettings(tokens="18k", data=source, train=train, lr=3e-3, sequence_length=128, **parts)
    report = api.heal(str(checkpoint), settings, output=str(tmp_path / "healed"))
    assert report["before"]["kl"] > factor * report["kl"]
    assert report["healing"]["trained_tokens"] == 18_432
    assert report["verified"]["cache"]["elements_per_token"] * 4 == report["kv_bytes_per_token"]["converted"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "healed"))
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    changed = {key for key in ours if not torch.equal(ours[key], theirs[key])}
    attention = {key for key in ours if ".self_attn." in key and ours[key].numel()}
    assert changed == {key for key in attention if train == "attention" or key.endswith(".weight")}
    record = json.loads((tmp_path / "healed" / "mhconvert.json").read_text())
    assert record["healed"][0]["settings"]["tokens"] == 18_000
    assert "model.safetensors" in record["sha256"]


def test_what_trains_where_nothing_is_said() -> None:
    assert HealSettings(tokens=1).train == "lora"
    assert HealSettings(tokens=1, fusion=2).train == "attention"


def test_a_run_that_was_cut_short_goes_on_to_the_bit(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "ckpt"))
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}), encoding="utf-8")
    settings = HealSettings(tokens=256 * 12, data={str(text): 1}, epochs=9, save_tokens=1024, **SMALL)
    api.heal(str(checkpoint), settings, output=str(tmp_path / "whole"), verify=False)

    class Cut(Exception):
        pass

    def cut(event: Progress) -> None:
        if event.stage == "heal" and event.done == 256 * 7:
            raise Cut

    place = str(tmp_path / "cut")
    with pytest.raises(Cut):
        api.heal(str(checkpoint), settings, output=place, verify=False, on_progress=cut)
    assert not Path(place).exists()
    with pytest.raises(
        OutputError, match=r"holds an interrupted run \(a checkpoint after step 4\); --resume"
    ):
        api.heal(str(checkpoint), settings, output=place, verify=False)
    other = dataclasses.replace(settings, seed=5)
    with pytest.raises(HealError, match="was started with another seed"):
        api.heal(str(checkpoint), other, output=place, verify=False, resume=True)
    api.heal(str(checkpoint), settings, output=place, verify=False, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "cut")) == 12
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_layer_stage_before_it_changes_nothing_of_that(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    """The rates follow the tensors' sizes behind the layer stage, after a resume too."""
    data, often = {str(text): 1}, {"save_tokens": 1024, "layer_tokens": 4096, "epochs": 9}
    settings = HealSettings(tokens=256 * 8, data=data, **often, **SMALL)
    api.heal(str(checkpoint), settings, output=str(tmp_path / "whole"), verify=False)
    seen: list[str] = []

    def cut(event: Progress) -> None:
        seen.append(event.stage)
        if event.stage == "heal" and event.done == 256 * 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "cut"), verify=False, on_progress=cut)
    api.heal(str(checkpoint), settings, output=str(tmp_path / "cut"), verify=False, resume=True)
    assert "blocks" in seen
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_refused_resume_touches_nothing(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    teacher = str(make_donor(tmp_path / "teacher"))
    settings = HealSettings(tokens=1024, teacher=teacher, data={str(text): 1}, layer_tokens=2048, **SMALL)

    def cut(event: Progress) -> None:
        if event.stage == "heal":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False, on_progress=cut)
    kept = sorted(path.name for path in (tmp_path / "out.partial" / "work").iterdir())
    assert "blocks.safetensors" in kept
    other = dataclasses.replace(settings, seed=5)
    with pytest.raises(HealError, match="was started with another seed"):
        api.heal(str(checkpoint), other, output=str(tmp_path / "out"), verify=False, resume=True)
    make_donor(Path(teacher), seed=4)
    with pytest.raises(HealError, match="was started with another teacher; --resume needs the same command"):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False, resume=True)
    assert sorted(path.name for path in (tmp_path / "out.partial" / "work").iterdir()) == kept


def test_a_resume_knows_its_models_by_their_files(tmp_path: Path) -> None:
    def write(name: str, value: int) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(str(value), encoding="utf-8")

    def space(checkpoint: str = "checkpoint") -> resumable_run.HealSpace:
        places = {"checkpoint": checkpoint, "teacher": "teacher"}
        models = {name: OpenModel(str(tmp_path / place), None, "cpu", None) for name, place in places.items()}
        told: dict[str, bool] = {"resume": True, "force": False, "main": True}
        return resumable_run.HealSpace(
            tmp_path / "out", HealSettings(tokens=1), models, {"steps": 1}, needed=0, **told
        )

    write("checkpoint", 1)
    write("teacher", 2)
    write("moved", 1)
    with space() as begun:
        begun.start()
    space().load()
    space("moved").load()
    for name, value in (("checkpoint", 1), ("teacher", 2)):
        write(name, 3)
        with pytest.raises(HealError, match=f"out.partial was started with another {name}; --resume needs"):
            space().load()
        write(name, value)

    write("checkpoint", 3)
    file = tmp_path / "out.partial" / "work" / resumable_run.STATE
    state = json.loads(file.read_text(encoding="utf-8"))
    del state["models"]  # as earlier versions wrote it
    file.write_text(json.dumps(state), encoding="utf-8")
    space().load()
    with pytest.raises(HealError, match=r"was started with another checkpoint \(.*checkpoint\)"):
        space("moved").load()


def test_the_text_alone_after_the_teacher_is_no_leap(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cross-entropy is many times KL."""
    monkeypatch.setattr(distill, "RECENT", 3)
    settings = HealSettings(tokens=256 * 8, lm_tokens=256 * 3, data={str(text): 1}, epochs=9, **SMALL)
    api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    found = losses(tmp_path / "out")
    assert min(found[5:]) > distill.SPIKE * max(found[:5])
    entries = read(tmp_path / "out" / "metrics.jsonl")
    assert entries[-1]["step"] == 8
    assert "held_out_kl" in entries[-1]


def test_gradients_are_of_what_trains(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """What the layer stage passed through has no gradient that clipping would count."""
    norms = []
    plain = distill.Distillation._step

    def step(self: Any, *words: Any) -> Any:
        norms.append(
            [name for name, p in self.model.named_parameters() if not p.requires_grad and p.grad is not None]
        )
        return plain(self, *words)

    settings = HealSettings(tokens=256, data={str(text): 1}, layer_tokens=2048, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill.Distillation, "_step", step)
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert norms == [[]]


def test_a_wider_teacher_of_the_same_tokenizer(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    wide = make_donor(tmp_path / "wide", hidden=96, layers=3, seed=4, vocab=384)  # rows that no token has
    make_tokenizer().save_pretrained(wide)
    data = {str(text): 1.0, "self": 1.0}
    settings = HealSettings(tokens=256 * 6, teacher=str(wide), data=data, epochs=9, **SMALL)
    report = api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert report["kl"] < report["before"]["kl"]
    assert "KL from the teacher" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for part in ({"loss": {"kl": 1.0, "hidden": 0.1}}, {"layer_tokens": 512}):
        other = dataclasses.replace(settings, **part)
        with pytest.raises(HealError, match="num_hidden_layers is 3 in the teacher .*wide and 2"):
            api.heal(str(checkpoint), other, output=str(tmp_path / "other"), verify=False)
    assert not (tmp_path / "other.partial").exists()


def test_a_report_keeps_nothing_that_is_of_the_unhealed_model(tmp_path: Path) -> None:
    kept = {"method": "mla", "parameters": {"donor": 2, "converted": 1}}
    gone = {"tolerance": {"asked": "generation=0.1"}, "on_policy": {"kl": 0.09, "count": 8}, "seconds": 3.0}
    (tmp_path / "report.json").write_text(json.dumps(kept | gone), encoding="utf-8")
    before, after = ({"perplexity": {}, "kl": kl, "top1_agreement": 0.5} for kl in (0.2, 0.1))
    report = write_result.report(str(tmp_path), tmp_path / "out", before, after)
    assert report == kept | after | {"before": before, "output": str(tmp_path / "out")}


def test_force_replaces_no_donor(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    teacher = make_donor(tmp_path / "teacher", seed=4)
    settings = HealSettings(tokens=256, teacher=str(teacher), data={str(text): 1}, **SMALL)
    for place in (teacher, checkpoint.parent / "donor"):
        with pytest.raises(OutputError):
            api.heal(str(checkpoint), settings, output=str(place), force=True, verify=False)
        assert (place / "config.json").is_file()


def test_another_runs_folder_is_left_alone(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "work").mkdir(parents=True)
    (tmp_path / "out.partial" / "work" / "state.json").write_text("{}", encoding="utf-8")
    settings = HealSettings(tokens=256, data={str(text): 1}, **SMALL)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputError, match="is not the work of"):
            api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False, **options)
    assert (tmp_path / "out.partial" / "work" / "state.json").is_file()


def test_a_batch_is_the_same_in_other_parts(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for micro in (1, 4):
        settings = HealSettings(tokens=256 * 4, data={str(text): 1}, **(SMALL | {"micro_batch": micro}))
        place = tmp_path / str(micro)
        api.heal(str(checkpoint), settings, output=str(place), verify=False)
        found.append(losses(place))
    assert found[0] == pytest.approx(found[1], rel=2e-3)  # bfloat16 products where the machine has them


def test_two_processes_are_one(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    words = [
        str(checkpoint),
        "--tokens",
        "2k",
        "--data",
        str(text),
        "--no-verify",
        "--device",
        "cpu",
        "--json",
    ]
    words += ["--sequence-length", "32", "--batch-tokens", "256", "--held-out", "2", "--micro-batch", "2"]
    words += ["--on-policy", "0.4"]
    alone = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    found = []
    for processes in (1, 2):
        place = tmp_path / str(processes)
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command = [sys.executable, *(launch if processes > 1 else []), "-m", "mhconvert.heal", *words]
        done = subprocess.run(
            [*command, "-o", str(place)],
            env=os.environ | alone,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["healing"]["processes"] == processes  # one object, from one of them
        found.append(losses(place))
    assert len(found[0]) == 8
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_leap_of_the_loss_stops_and_keeps_the_last_good_checkpoint(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "RECENT", 3)
    monkeypatch.setattr(distill, "SPIKE", 1.02)
    settings = HealSettings(tokens=256 * 40, data={str(text): 1}, epochs=99, lr=0.5, save_tokens=256, **SMALL)
    with pytest.raises(
        HealError, match=r"the loss leapt to .* in step \d+; the durable checkpoint after step \d+ is kept"
    ):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    state = json.loads((tmp_path / "out.partial" / "work" / resumable_run.STATE).read_text())
    assert state["step"] > 0
    weights = load_file(next((tmp_path / "out.partial" / "work").glob("step-*/model.safetensors")))
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_loss_that_is_no_number_stops(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = distill.Student.forward

    def broken(self: Any, *words: Any, **named: Any) -> Any:
        found = plain(self, *words, **named)
        return {name: value * torch.nan for name, value in found.items()} if found else found

    monkeypatch.setattr(distill.Student, "forward", broken)
    settings = HealSettings(tokens=512, data={str(text): 1}, **SMALL)
    with pytest.raises(HealError, match="the loss is nan in step 1; nothing was durable yet"):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert list(tmp_path.iterdir()) == []  # nothing was learnt, so nothing is kept


def test_stages_and_a_log(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Layers first, then the teacher, then the text alone; a healed checkpoint can be healed again."""
    loss, data = {"kl": 1, "hidden": 0.1}, {str(text): 1}
    settings = HealSettings(
        tokens=1024, layer_tokens=2048, lm_tokens=256, data=data, epochs=9, loss=loss, **SMALL
    )
    stages: list[str] = []
    report = api.heal(
        str(checkpoint),
        settings,
        output=str(tmp_path / "one"),
        on_progress=lambda event: stages.append(event.stage),
    )
    assert list(dict.fromkeys(stages)) == ["donor", "text", "measure", "blocks", "heal", "verify", "done"]
    steps = [entry for entry in read(tmp_path / "one" / "metrics.jsonl") if "loss" in entry]
    assert [entry["kl"] > 0 for entry in steps] == [True, True, True, False]
    assert steps[-1]["loss"] == steps[-1]["ce"]
    assert report["healing"]["steps"] == 4
    again = HealSettings(tokens=256, data={str(text): 1}, train="lora", rank=2, **SMALL)
    api.heal(str(tmp_path / "one"), again, output=str(tmp_path / "two"), verify=False)
    assert len(json.loads((tmp_path / "two" / "mhconvert.json").read_text())["healed"]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "other"}, "has another tokenizer than"),
        ({"data": {"short.txt": 1}}, "short.txt has 0 tokens to train on"),
        ({"sequence_length": 4096}, "sequence_length=4096 is more than the models read"),
        ({"data": {"absent.txt": 1}}, "absent.txt cannot be read"),
    ],
)
def test_bad_input(
    settings: dict[str, Any], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_donor(tmp_path / "other", vocab=300)
    Path("short.txt").write_text("Not much.", encoding="utf-8")
    with pytest.raises(MhconvertError, match=message):
        api.heal(str(checkpoint), HealSettings(tokens=256, **(SMALL | settings)), output="out", verify=False)
    assert not Path("out").exists()
    assert not Path("out.partial").exists()


def test_a_donor_is_not_healed(checkpoint: Path) -> None:
    donor = checkpoint.parent / "donor"
    with pytest.raises(HealError, match="is not a checkpoint that mhconvert wrote; convert a donor first"):
        api.heal(str(donor), HealSettings(tokens=256, **SMALL), verify=False)
    for reference, message in (
        (f"{donor}-", "there is no folder"),
        ("smollm2-135m", "convert a donor first"),
    ):
        with pytest.raises(MhconvertError, match=message):
            api.heal(reference, HealSettings(tokens=256, **SMALL), verify=False)


def test_too_little_memory_says_what_helps(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(distill.Distillation, "_step", full)
    settings = HealSettings(tokens=256, data={str(text): 1}, **SMALL)
    with pytest.raises(HealError, match="not enough memory for a step: try a smaller --micro-batch"):
        api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)


def test_a_damaged_shard_is_named(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(MhconvertError, match=r"model\.safetensors is truncated"):
        api.heal(
            str(broken), HealSettings(tokens=256, data={str(text): 1}, **SMALL), output=str(tmp_path / "out")
        )
    assert not (tmp_path / "out.partial").exists()


def test_the_line_of_a_layer_stage_alone_says_what_was_done(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    settings = HealSettings(layer_tokens=512, data={str(text): 1}, **SMALL)
    report = api.heal(str(checkpoint), settings, output=str(tmp_path / "out"), verify=False)
    assert healing_line(report).startswith("each layer on 512 tokens, ")
    assert "steps" not in healing_line(report)
