"""What shipped modeling files have in common is the same in all of them: each is shipped alone, with its own copy."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "convert" / "methods"
# file -> its own names, each with the role that it has in every file
NAMES = {
    "dha/modeling_dha.py": ("DHA", "DecoupledHead", "configuration_dha"),
    "mla/modeling_mla.py": ("MLA", "Latent", "configuration_mla"),
    "mla/modeling_coded_mla.py": ("CodedMLA", "CodedLatent", "configuration_coded_mla"),
    "mla/served/modeling_served.py": ("MLAServed", "ServedLatent", "configuration_served"),
    "moh/modeling_moh.py": ("MoH", "MixtureOfHead", "configuration_moh"),
    "dha/configuration_dha.py": ("DHA", "DecoupledHead", ""),
    "mla/configuration_mla.py": ("MLA", "Latent", ""),
    "mla/configuration_coded_mla.py": ("CodedMLA", "CodedLatent", ""),
    "mla/served/configuration_served.py": ("MLAServed", "ServedLatent", ""),
    "moh/configuration_moh.py": ("MoH", "MixtureOfHead", ""),
}
COPIED = {  # piece -> files whose function of that name is another one
    "modeling: __getattr__": (),
    "modeling: ForCausalLM.__init__": (),
    "modeling: Model._apply": (),
    "modeling: Attention.own_mask": ("moh/modeling_moh.py",),  # it masks single heads by the same rule
    "configuration: Fields.layer_window": (),
}
DIFFERENT = {  # same name, other function
    "configuration: __getattr__": "each method has its own tensor-parallel plan and model type",
    "configuration: Fields.latent_rank": "the served form has one rank for all layers",
    "configuration: Fields.layer_frequencies": "the served form has one series of frequencies for all layers",
    "configuration: latent_tp_plan": "the served form has other projections",
    "modeling: Attention.expand_kv": "the served form is multi-query attention over the latent",
    "modeling: Attention.__init__": "the layers of each method",
    "modeling: Attention.forward": "the attention of each method",
    "modeling: Model.__init__": "the layers of each method",
}


def pieces(name: str, text: str) -> dict[str, str]:
    """Functions and methods by their name without the file's own names; their code, without docstrings, likewise."""
    prefix, stem, config = NAMES[name]
    kind = "modeling" if "modeling" in name else "configuration"
    found = {}
    for node in ast.parse(text).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inner:
            if not isinstance(function, ast.FunctionDef):
                continue
            if ast.get_docstring(function) is not None:
                del function.body[0]
            code = ast.unparse(function)
            for own, role in ((config, "CONFIGURATION"), (stem + "Attention", "STEM"), (stem, "STEM")):
                code = re.sub(rf"\b{own}(?=[A-Z]|\b)", role, code) if own else code
            code = re.sub(rf"(?<=['\"]){prefix}(?=['\"{{])", "PREFIX", code)
            owner = node.name.replace(stem, "").replace("STEM", "") if isinstance(node, ast.ClassDef) else ""
            owner = owner.removeprefix("Attention") or "Attention" if isinstance(node, ast.ClassDef) else ""
            found[f"{kind}: {owner}.{function.name}" if owner else f"{kind}: {function.name}"] = code
    return found


def shared() -> dict[str, dict[str, str]]:
    """piece -> file -> code, of the pieces that more than one file has."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in NAMES:
        for piece, code in pieces(name, (FOLDER / name).read_text(encoding="utf-8")).items():
            found[piece][name] = code
    return {piece: codes for piece, codes in found.items() if len(codes) > 1}


@pytest.mark.parametrize("piece", COPIED)
def test_a_copied_piece_is_the_same_everywhere(piece: str) -> None:
    codes = {name: code for name, code in shared()[piece].items() if name not in COPIED[piece]}
    assert len(codes) > 1
    first = next(iter(codes.values()))
    assert {name: code for name, code in codes.items() if code != first} == {}


def test_every_shared_piece_is_copied_or_different_for_a_reason() -> None:
    assert set(shared()) == {*COPIED, *DIFFERENT}


def test_a_copy_that_was_changed_is_found() -> None:
    name = "moh/modeling_moh.py"
    text = (FOLDER / name).read_text(encoding="utf-8")
    changed = pieces(name, text.replace('endswith("inv_freq")', 'endswith("freq")'))
    assert changed["modeling: Model._apply"] != shared()["modeling: Model._apply"][name]
