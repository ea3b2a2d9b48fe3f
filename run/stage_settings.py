"""Settings of the stages that follow an evaluation: export and push."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Literal

from mhconvert.errors import RecipeError

from ..convert.methods.registry import forms, info
from ..convert.recipe.folder_name import require_folder_name
from ..convert.validation.field_types import changed_fields
from ..convert.validation.option import Option, Takes, default
from ..convert.validation.settings import Settings

PLACE = ("to", "output")  # of an export: what is no option of a form


def known_form(to: str) -> str:
    """Return the form as it is. Raises RecipeError for one that no method has."""
    if not to.strip():
        raise RecipeError("to is empty; name a form such as lora")
    if to not in (*forms(), "auto"):
        raise RecipeError(f"to '{to}' is no form of export; choose one of {', '.join(forms())}, auto")
    return to


def export_fault(method: str, stage: ExportStage) -> tuple[str, str] | None:
    """Return the key of what no export of `method` takes, and why; None where all is taken.

    Imports the writers of the forms, and torch with them, where there is an option."""
    own = {form.name: form for form in info(method).forms}
    if not own:
        return "to", f"to: a checkpoint of {method} {info(method).no_forms}"
    if stage.to not in (*own, "auto"):
        source = forms()[stage.to][0].exported_from
        return "to", f"to '{stage.to}' holds {source}; of {method} choose one of {', '.join(own)}, auto"
    given = [name for name in changed_fields(stage) if name not in PLACE]
    if not given:
        return None
    from ..convert.export.forms import automatic_forms, not_taken

    tried = [own[stage.to]] if stage.to in own else automatic_forms(info(method), stage.engine)
    for name in not_taken(given, tried):
        return name, f"{name} does not apply to an export of {method} to {stage.to}; leave it out"
    return None


@dataclass(frozen=True)
class ExportStage(Settings):
    """Another form of the result."""

    fault = RecipeError

    to: Annotated[str, Option("A form such as lora, or auto.", "FORM", parse=known_form, also=str)]
    output: Annotated[
        Takes[str | None, str | PurePath | None],
        Option("Folder to write.", "OUT", default="beside the checkpoint"),
    ] = default(None)
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, Option("mla: of the weights.", default="their own")
    ] = None
    kind: Annotated[Literal["f32", "f16", "bf16", "q8_0"], Option("gguf: of the weights.")] = "bf16"
    pad_row: Annotated[
        Literal[320, 512, 576] | None,
        Option(
            "mla: widen the latent with zeros until a row has so many elements, for vLLM.",
            "N",
            default="as it is",
        ),
    ] = None
    engine: Annotated[
        Literal["vllm", "sglang", "llama.cpp", "transformers"] | None,
        Option("Refuse what this engine does not take; with auto, take a form that it does.", default="none"),
    ] = None
    duplicate: Annotated[bool, Option("dha: heads may be cached twice where that makes groups equal.")] = (
        False
    )

    def check(self) -> None:
        """Raise RecipeError for an output that is no name of a folder."""
        require_folder_name(self.output)


@dataclass(frozen=True)
class PushStage(Settings):
    """Upload of the result to the Hugging Face Hub."""

    fault = RecipeError

    repo: Annotated[str, Option("owner/name, or a name of one's own.", "USER/REPO", flag="")]
    private: Annotated[bool, Option("Make the repository private, if it is made for this.")] = False
    revision: Annotated[str | None, Option("A branch.", "BRANCH", default="main")] = None

    def check(self) -> None:
        """Raise RecipeError for what is no name of a repository or branch."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise RecipeError(f"repo '{self.repo}' is no name of a repository: {error}") from error
        if self.revision is not None and not self.revision.strip():
            raise RecipeError("revision is empty; name a branch, or leave it out")
