"""No code but the package's own runs in the process that checks a folder, unless it is trusted."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mhconvert
from mhconvert import api
from mhconvert.convert.bare_process.known_code import released, require_known_code
from mhconvert.convert.methods.dha import configuration_dha
from mhconvert.convert.methods.mla import modeling_mla
from mhconvert.convert.methods.mla.settings import MLASettings
from mhconvert.convert.recipe.heal_settings import HealSettings
from mhconvert.convert.recipe.recipe import Calibration, Recipe
from mhconvert.errors import CheckpointError, UnsupportedError
from tests.donors import TEXT, make_donor


def test_what_is_shipped_is_released() -> None:
    """Whoever changes a shipped file adds its line (sha256sum) to released_code.sha256 and leaves the old ones."""
    package = Path(mhconvert.__file__).parent / "convert"
    shipped = [path for path in package.rglob("*.py") if "file is shipped inside" in path.read_text()]
    assert len(shipped) == 19
    for path in shipped:
        assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.name) in released(), path


def test_a_file_of_an_earlier_version_is_known_by_its_name(tmp_path: Path) -> None:
    """configuration_dha.py of version 0.2.0, which knew no QK-norm."""
    now = Path(configuration_dha.__file__).read_text()
    start, end = now.index('    qk_norm: "head"'), now.index('    """\n\n    k_head_map')
    earlier = (now[:start] + now[end:]).replace("    qk_norm: str | None = None\n", "")
    file = tmp_path / "configuration_dha.py"
    file.write_text(earlier)
    require_known_code(tmp_path)
    file.rename(tmp_path / "modeling_dha.py")
    with pytest.raises(UnsupportedError, match="no version of mhconvert"):
        require_known_code(tmp_path)


def other_repository(folder: Path) -> None:
    (folder / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "org/evil--modeling_x.M"}}')


def path_of_its_own(folder: Path) -> None:
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "/tmp/evil/mod.Cls"}}')


def old_form(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": ["org/evil--tok.T", null]}')


def file_of_its_own(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "modeling_x.py").write_text("")


def changed_file(folder: Path) -> None:
    file = folder / Path(modeling_mla.__file__).name
    file.write_text(file.read_text() + "\n")


def linked_folder(folder: Path) -> None:
    (folder / "code").symlink_to(folder.parent)


@pytest.mark.parametrize(
    "plant", [other_repository, path_of_its_own, old_form, file_of_its_own, changed_file, linked_folder]
)
def test_code_that_is_not_ours_is_named(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(modeling_mla.__file__, folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_mla.M"}}')
    require_known_code(folder)
    plant(folder)
    with pytest.raises(UnsupportedError, match="--trust-remote-code allows it"):
        require_known_code(folder)


def test_healing_runs_no_code_of_the_checkpoint(tmp_path: Path) -> None:
    """A line that was added to its modeling file, code of another repository, and a file beside it."""
    text, donor, out = tmp_path / "text.txt", make_donor(tmp_path / "donor"), tmp_path / "out"
    text.write_text(TEXT * 20)
    few = Calibration((str(text),), tokens=128, sequence_length=32, held_out=2)
    settings = MLASettings(kv_bits="16")
    api.convert(
        Recipe(str(donor), "mla", settings, output=str(out), calibration=few, effort="quick", verify=False)
    )
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    modeling, config = out / "modeling_mla.py", out / "config.json"
    original = modeling.read_text()
    modeling.write_text(original + evil)
    (out / "evil.py").write_text(evil)
    values = json.loads(config.read_text())
    before = values["auto_map"] | {}
    values["auto_map"] = dict.fromkeys(values["auto_map"], "org/evil--modeling_x.M")
    config.write_text(json.dumps(values))
    heal = HealSettings(tokens=64, data={str(text): 1}, sequence_length=32, batch_tokens=64, held_out=2)
    report = api.heal(str(out), heal, output=str(tmp_path / "healed"))
    assert report["verified"]["largest_logit_difference"] < 1e-3
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "healed" / "modeling_mla.py").read_text() == original
    assert not (tmp_path / "healed" / "evil.py").exists()
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["auto_map"] == before


def test_a_link_out_of_the_donor_is_not_copied(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("hf_secret")
    donor = make_donor(tmp_path / "donor")
    (donor / "LICENSE").unlink()
    (donor / "LICENSE").symlink_to(secret)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    few = Calibration((str(text),), tokens=128, sequence_length=32, held_out=2)
    asked = Recipe(
        str(donor), "mla", output=str(tmp_path / "out"), calibration=few, effort="quick", verify=False
    )
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*token, which is no file of a model"):
        api.convert(asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor", "text.txt", "token"]


def test_a_donor_put_together_of_links_is_ordinary(tmp_path: Path) -> None:
    donor, linked, out = make_donor(tmp_path / "donor"), tmp_path / "linked", tmp_path / "out"
    linked.mkdir()
    for file in donor.iterdir():
        (linked / file.name).symlink_to(file)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    few = Calibration((str(text),), tokens=128, sequence_length=32, held_out=2)
    settings = MLASettings(kv_bits="16")
    api.convert(
        Recipe(str(linked), "mla", settings, output=str(out), calibration=few, effort="quick", verify=False)
    )
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "LICENSE").read_bytes() == (donor / "LICENSE").read_bytes()
