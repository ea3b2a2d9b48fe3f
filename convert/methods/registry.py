"""The methods, by name: those that rewrite a donor's layers, and those that put an adapter beside it.

A method is a folder beside this file and a line in `FOLDERS`. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from mhconvert.errors import MhconvertError, UnsupportedError

from .layer_fits import PLAIN, Options
from .method_info import ATTENTION_CHECKS as ATTENTION_CHECKS
from .method_info import MODEL_CHECKS as MODEL_CHECKS
from .method_info import Form as Form
from .method_info import MethodInfo as MethodInfo

FOLDERS = (
    "mla",
    "dha",
    "moh",
    "swa",
    "mla_swa",
    "hybrid_mla",
    "hydra",
)

METHODS: dict[str, MethodInfo] = {}  # that rewrite layers: a pass over the donor makes a checkpoint
CACHE_METHODS: dict[str, MethodInfo] = {}  # of METHODS, those that make the KV cache smaller
ADAPTERS: dict[str, MethodInfo] = {}  # that rewrite no layer: peft loads the result
_ALL: dict[str, MethodInfo] = {}
METHOD_NAMES = _ALL.keys()  # a view: methods that are added later are in it


def add(info: MethodInfo) -> None:
    """Make a method known in this process, such as one from another package.

    Raises MhconvertError for the name of another method.
    """
    if _ALL.setdefault(info.name, info) != info:
        raise MhconvertError(f"there is a method '{info.name}' already, in {_ALL[info.name].package}")
    if info.kind == "adapter":
        ADAPTERS[info.name] = info
        return
    METHODS[info.name] = info
    if info.shrinks_cache:
        CACHE_METHODS[info.name] = info


def remove(name: str) -> None:
    """Take a method out that `add` made known; one that is unknown is left unknown."""
    for table in (_ALL, METHODS, CACHE_METHODS, ADAPTERS):
        table.pop(name, None)


def info(name: str) -> MethodInfo:
    """What is known of the method `name`. Raises UnsupportedError for an unknown one."""
    if name not in _ALL:
        raise UnsupportedError(f"method '{name}' is unknown; choose one of {', '.join(_ALL)}")
    return _ALL[name]


def forms() -> dict[str, tuple[MethodInfo, Form]]:
    """The export forms of all methods by name, each with the method whose checkpoints have it."""
    return {form.name: (method, form) for method in _ALL.values() for form in method.forms}


for _folder in FOLDERS:
    add(importlib.import_module(f"{__package__}.{_folder}.info").INFO)


def whole_elements(elements: float, context: int | None) -> float:
    """Cache elements per token of `context` tokens, rounded up; as they are where the context is None."""
    return elements if context is None else -(-round(elements * context) // context)


class Method(Protocol):
    """One conversion of one donor: all that the pass over the layers knows of a method.

    Made from (donor's config, settings, effort); making it raises every refusal, before any weight is read.
    replaced: prefixes of the names of a decoder layer's tensors that the method writes anew.
    """

    replaced: tuple[str, ...]
    # Whether no fit follows `convert`; an attention that says so itself is not fitted either.
    closed_form: bool = False
    fitted_layers: int | None = None  # how many layers a fit follows; None: all
    fit_steps: dict[str, int] | None = None  # of a layer by effort; None: as for the others
    fit_options: Options = PLAIN  # what the fit of a layer is told beside its steps
    least_row: int = 0  # tokens that a calibration row needs to show what the method changes
    cache_context: int | None = None  # tokens for which cache sizes a token are stated; None: any number
    layer_tokens: int | None = None  # of calibration text that a layer is converted from; None: all of it
    added_tensors: int = 2  # by which a written layer has more than the donor's, at most
    notice: str = ""  # a sentence for the user about the plan, if there is anything to say
    unconstrained: Any = (
        None  # settings without a constraint, whose price a survey measures; None: there is none
    )
    surveys_sensitivity: bool = False  # whether `share_out` takes a `LayerSensitivity` for each layer

    def kv_bytes(self, element_bytes: int) -> int:
        """Bytes that a token leaves in a cache whose elements have `element_bytes`, all layers together."""
        return self.kv_elements() * element_bytes

    @property
    def model_class(self) -> Any:
        """The transformers class that holds the result, with its language-model head.

        One of the method's own has its decoder stack's class as `decoder_class`.
        """
        ...

    def kv_elements(self) -> int:
        """Cache elements per token of the converted model, all layers together."""
        ...

    @property
    def divisible(self) -> bool:
        """Whether `share_out` may give each layer a budget of its own."""
        ...

    @property
    def survey_shares(self) -> tuple[float, ...]:
        """Budgets of a layer, as shares of its cache elements, at which a survey measures it."""
        ...

    def share_out(self, needs: Any) -> None:
        """Divide the whole budget over the layers before any is converted.

        Args:
            needs: a `LayerNeed` for each layer.
        """
        ...

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned sizes of one layer; those that the survey or the pass chooses are missing."""
        ...

    def totals(self) -> dict[str, Any]:
        """Sums over the layers beside cache and parameters: name -> {"donor": …, "converted": …}."""
        ...

    @property
    def kind_facts(self) -> dict[str, Any]:
        """What its `layer_kind` is made with, such as the width of a window; empty where layers are of one kind."""
        return {}

    def new_parameters(self) -> int:
        """Parameters that the method writes in one layer, at most; in the mean layer where layers differ in size."""
        ...

    def stored(self, attention: Any) -> dict[str, Any]:
        """The tensors of a converted attention by the names that `model_class` has for them."""
        return dict(attention.state_dict())

    def observe(self, attention: Any, inputs: Any, rotary: Any) -> Any:
        """What `convert` needs of a donor layer; the same for every budget, and kept when the layer is gone.

        A method that computes the attention's outputs (N, L, D) for it returns them too, as `outputs`.

        Args:
            attention: the donor's attention module, float32.
            inputs: (N, L, D) float32, what it reads on calibration text.
            rotary: its `LayerRotary`.
        """
        ...

    def convert(
        self, statistics: Any, index: int, inputs: Any, targets: Any, position_embeddings: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The new attention of a layer, and what was chosen for it as JSON has it.

        Args:
            statistics: what `observe` returned for the layer.
            index: of the layer.
            inputs, targets: (N, L, D) float32, what the donor's attention reads and returns on calibration text.
            position_embeddings: (cos, sin), each (1, L, rotary width); the result is on their device, float32.
        """
        ...

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished, from what `convert` said was chosen."""
        ...

    def finish(self) -> Any:
        """The configuration of the converted model, after every layer was converted or restored."""
        ...

    def example_config(self) -> Any:
        """A configuration of the planned size that no weights were read for: enough to build and time a model."""
        ...


def settings_class(method: str) -> Any:
    """The frozen dataclass of choices of `method`; imports no torch.

    One of METHODS has `at_budget(share)`, the same choices at another share of what it divides over the layers; of
    CACHE_METHODS that is `kv_budget`, a share of the donor's KV elements.
    """
    return importlib.import_module(f"{info(method).package}.settings").SETTINGS


def register(name: str) -> None:
    """Make transformers' Auto classes know the models of the method `name` in this process."""
    importlib.import_module(info(name).package).register()


def build_method(name: str, config: Any, settings: Any, effort: str) -> Method:
    """The method `name` for a donor with `config`.

    Args:
        effort: a recipe's ("quick", "default", "high"), or "survey", which is less than quick.
    Raises:
        UnsupportedError: for a donor that the method does not apply to.
        BudgetError: for settings that the donor's sizes cannot express.
    """
    return importlib.import_module(f"{info(name).package}.method").METHOD(config, settings, effort)
