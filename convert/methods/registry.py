"""The methods, by name: those that rewrite a donor's layers, and those that put an adapter beside it."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

METHODS = {  # one folder each; the pass over the layers makes a checkpoint
    "mla": "mhconvert.convert.methods.mla",
    "dha": "mhconvert.convert.methods.dha",
    "moh": "mhconvert.convert.methods.moh",
}
CACHE_METHODS = ("mla", "dha")  # of them, those that make the KV cache smaller
ADAPTERS = {
    "hydra": "mhconvert.convert.methods.hydra"
}  # who writes them: no layer is rewritten, and peft loads the result
METHOD_NAMES = (*METHODS, *ADAPTERS)


class Method(Protocol):
    """All that the pass knows of a method. Building one raises every refusal, before any weight is read.

    replaced: prefixes of a decoder layer's tensors that the method writes anew. model_class: the transformers
    class that holds the result.
    """

    replaced: tuple[str, ...]

    @property
    def model_class(self) -> Any: ...

    @property
    def decoder_class(self) -> Any:
        """The same without its language-model head."""
        ...

    def kv_elements(self) -> int:
        """Cache elements per token of the converted model, all layers."""
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
        """Divide the whole budget over the layers by their needs, `LayerNeed` of each, before any is converted."""
        ...

    def layer_sizes(self, index: int) -> dict[str, int]:
        """Planned sizes of one layer; those that the survey or the pass chooses are missing."""
        ...

    def totals(self) -> dict[str, Any]:
        """Sums over the layers that the method changes beside cache and parameters, of the donor and converted."""
        ...

    def new_parameters(self) -> int:
        """Parameters that the method writes in one layer, at most; in the mean layer where they differ in size."""
        ...

    def observe(self, attention: Any, inputs: Any, rotary: Any) -> Any:
        """What `convert` needs of a donor's attention: the same for every budget, and kept past the layer."""
        ...

    def convert(
        self, statistics: Any, index: int, inputs: Any, targets: Any, position_embeddings: Any
    ) -> tuple[Any, dict[str, Any]]:
        """A new attention module for layer `index`, observed as `statistics`, and what was chosen for it."""
        ...

    def restore(self, index: int, chosen: dict[str, Any]) -> None:
        """Take over a layer that an interrupted run finished, from what `convert` said was chosen."""
        ...

    def finish(self) -> Any:
        """The configuration of the converted model."""
        ...

    def example_config(self) -> Any:
        """A configuration of the planned size that no weights were read for: enough to build and time a model."""
        ...


def settings_class(method: str) -> Any:
    """The frozen dataclass of choices of `method`; imports no torch.

    One of METHODS has `at_budget(share)`, the same choices at another share of what it divides over the layers; of
    CACHE_METHODS that is `kv_budget`, a share of the donor's KV elements.
    """
    return importlib.import_module(f"{(METHODS | ADAPTERS)[method]}.settings").SETTINGS


def register(name: str) -> None:
    """Make transformers' Auto classes know the models of the method `name` in this process."""
    importlib.import_module(METHODS[name]).register()


def build_method(name: str, config: Any, settings: Any, effort: str) -> Method:
    """The method `name` for a donor with `config`. effort: a recipe's, or "survey": less than quick.

    Raises UnsupportedError or BudgetError.
    """
    return importlib.import_module(f"{METHODS[name]}.method").METHOD(config, settings, effort)
