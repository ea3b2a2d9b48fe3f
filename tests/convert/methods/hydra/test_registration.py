"""Hydra in peft's enum and tables: once, completely, and not over a method of peft's own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

from mhconvert.convert.methods.hydra import HydraConfig, HydraModel
from mhconvert.convert.methods.hydra.registration import add_peft_type, register
from mhconvert.errors import AdapterError

KINDS: Any = PeftType


def test_the_member_is_a_member_in_every_way() -> None:
    member = KINDS.HYDRA
    assert KINDS["HYDRA"] is KINDS("HYDRA") is member
    assert [kind for kind in KINDS if kind == "HYDRA"] == [member]
    assert "HYDRA" in list(KINDS)
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str(member.value), repr(member)) == (
        "HYDRA",
        "HYDRA",
        "HYDRA",
        "<PeftType.HYDRA: 'HYDRA'>",
    )
    assert hash(member) == hash("HYDRA")
    assert {member: 1}["HYDRA"] == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert [kind.value for kind in KINDS].count("HYDRA") == 1
    assert KINDS.LORA is not member


def test_the_tables_know_it() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[KINDS.HYDRA] is HydraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[KINDS.HYDRA] is HydraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[KINDS.HYDRA] == "hydra_"


def test_registering_again_changes_nothing() -> None:
    before = list(KINDS), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    register(HydraConfig, HydraModel)
    register(HydraConfig, HydraModel)
    assert add_peft_type("HYDRA") is KINDS.HYDRA
    assert (list(KINDS), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)) == before


class Theirs:
    """A HydraConfig that a later peft might bring."""

    __module__ = "peft.tuners.hydra.config"


def test_a_method_of_that_name_in_peft_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, KINDS.HYDRA, Theirs)  # type: ignore[misc]
    with pytest.raises(
        AdapterError, match=r"has a method of its own under the name of Hydra \(peft.tuners.hydra"
    ):
        register(HydraConfig, HydraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[KINDS.HYDRA] is Theirs


def test_a_method_with_that_prefix_in_peft_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, KINDS.HYDRA)
    with pytest.raises(AdapterError, match=rf"peft {peft.__version__} has a method of its own"):
        register(HydraConfig, HydraModel)


UPSTREAM = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft import LoraConfig, LoraModel
PEFT_TYPE_TO_CONFIG_MAPPING["HYDRA"] = LoraConfig
PEFT_TYPE_TO_PREFIX_MAPPING["HYDRA"] = "hydra_"
try:
    from mhconvert import HydraConfig
except ValueError as error:
    print(error)
assert PEFT_TYPE_TO_CONFIG_MAPPING["HYDRA"] is LoraConfig
import mhconvert.convert.methods.mla  # the rest of the package goes on
"""


def test_importing_beside_a_method_of_peft_s_own_says_so() -> None:
    done = subprocess.run([sys.executable, "-c", UPSTREAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "so mhconvert's is not registered; use peft's" in done.stdout


BESIDE = """
import sys
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft import LoraConfig
PEFT_TYPE_TO_CONFIG_MAPPING["HYDRA"] = LoraConfig
PEFT_TYPE_TO_PREFIX_MAPPING["HYDRA"] = "hydra_"
import mhconvert
facts = mhconvert.inspect(sys.argv[1])["methods"]
print(facts["mla"]["applies"], facts["hydra"])
print(mhconvert.merge(sys.argv[2], sys.argv[3])["method"])
"""


def test_the_rest_goes_on_beside_a_method_of_peft_s_own(
    biased_donor: Path, saved_lora: Any, tmp_path: Path
) -> None:
    words = [str(path) for path in (biased_donor, saved_lora()[0], tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", BESIDE, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    inspected, merged = done.stdout.splitlines()
    assert inspected.startswith("True {'applies': False, 'reason': ")
    assert "has a method of its own under the name of Hydra" in inspected
    assert merged == "lora"


def test_plain_import_is_light_and_registers_nothing() -> None:
    script = "import sys, mhconvert; print(sorted({'torch', 'peft', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_root_has_the_config() -> None:
    import mhconvert

    assert mhconvert.HydraConfig is HydraConfig
