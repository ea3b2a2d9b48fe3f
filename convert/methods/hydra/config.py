"""The configuration of a Hydra adapter in peft, as `adapter_config.json` holds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from mhconvert.errors import AdapterError
from mhconvert.version import __version__

from ...validation.field_types import is_number, require_expression
from . import card
from .settings import LARGEST_RANK, RANK

BIASES = ("none", "all", "hydra_only")
RANKS = ("r_par", "r_seq")


@dataclass
class HydraConfig(PeftConfig):
    """The configuration of a Hydra adapter.

    target_modules (None: by model type), exclude_modules, layers_to_transform, layers_pattern and modules_to_save mean
    what they mean in `peft.LoraConfig`.

    Attributes:
        r_par, r_seq: ranks of the branch that reads a layer's input and of the one that reads its output; 0: none.
        scale: what both branches are multiplied by (LoRA's alpha / r).
        dropout: probability of the dropout between a branch's two matrices, in training.
        rank_pattern: other ranks by module name, which is a suffix or a regular expression as in LoRA:
            {"down_proj": {"r_seq": 16}}.
        init_weights: whether B starts as zeros, so that the adapted model computes what its base does; False: random.
        bias: which biases of the base model are trained: "none", "all", or "hydra_only" (of the adapted layers).
        mhconvert_version: of the writer, filled in.
    Raises:
        AdapterError: for values that no adapter can have; it is a ValueError too.
    """

    r_par: int = 8
    r_seq: int = 8
    scale: float = 1.0
    dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    rank_pattern: dict[str, dict[str, int]] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "hydra_only"] = "none"
    init_weights: bool = True
    mhconvert_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("HYDRA")
        self.mhconvert_version = self.mhconvert_version or __version__
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                require_expression(value, name)
            elif value is not None:
                if not isinstance(value, list | set | tuple) or not all(isinstance(v, str) for v in value):
                    raise AdapterError(f"{name}={value!r} is neither names in a list nor an expression")
                setattr(self, name, set(value))
        _check_ranks(self.r_par, self.r_seq, "")
        self._check_patterns()
        if not is_number(self.scale):
            raise AdapterError(f"scale={self.scale!r} is not a finite number")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout={self.dropout!r} is outside [0, 1); it is a share of the elements")
        if self.bias not in BIASES:
            raise AdapterError(f"bias='{self.bias}' is not one of {', '.join(BIASES)}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise AdapterError(
                    f"{name} goes with a list of target_modules; the expression '{self.target_modules}' names the "
                    "layers itself"
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise AdapterError("layers_pattern says where layers_to_transform counts; give both or neither")

    def ranks(self, module_name: str) -> tuple[int, int]:
        """r_par and r_seq of the module with that full name."""
        own = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module_name), {})
        return own.get("r_par", self.r_par), own.get("r_seq", self.r_seq)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in plain types; sets become sorted lists, so that equal configurations give equal files."""
        return {
            name: sorted(value) if isinstance(value, set) else value
            for name, value in super().to_dict().items()
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the folder's README.md how to load the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        card.add_notice(Path(save_directory), self.base_model_name_or_path)

    def _check_patterns(self) -> None:
        """Raises AdapterError for a rank_pattern that is no expressions with ranks."""
        if not isinstance(self.rank_pattern, dict):
            raise AdapterError(f"rank_pattern={self.rank_pattern!r} is not ranks by module; {{}} for none")
        for pattern, own in self.rank_pattern.items():
            require_expression(pattern, "rank_pattern")
            if not isinstance(own, dict) or not own or set(own) - set(RANKS):
                raise AdapterError(
                    f"rank_pattern['{pattern}']={own!r} is not ranks by name, such as {{'r_par': 4, 'r_seq': 16}}"
                )
            _check_ranks(
                own.get("r_par", self.r_par), own.get("r_seq", self.r_seq), f"rank_pattern['{pattern}']: "
            )


def _check_ranks(r_par: Any, r_seq: Any, where: str) -> None:
    """Raises AdapterError, beginning with `where`, for ranks out of range, or both of them 0."""
    for name, rank in zip(RANKS, (r_par, r_seq), strict=True):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= LARGEST_RANK:
            raise AdapterError(f"{where}{name}={rank!r} {RANK}")
    if r_par + r_seq == 0:
        raise AdapterError(
            f"{where}r_par=0 and r_seq=0 leave nothing to train; give at least one of them a rank"
        )
