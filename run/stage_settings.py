"""Settings of the stages that follow an evaluation: export and push."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated

from mhconvert.errors import RecipeError

from ..convert.methods.registry import forms, info
from ..convert.recipe.folder_name import require_folder_name
from ..convert.validation.option import Option, Takes, default
from ..convert.validation.settings import Settings


def known_form(to: str) -> str:
    """Return the form as it is. Raises RecipeError for one that no method has."""
    if not to.strip():
        raise RecipeError("to is empty; name a form such as lora")
    if to not in (*forms(), "auto"):
        raise RecipeError(f"to '{to}' is no form of export; choose one of {', '.join(forms())}, auto")
    return to


def form_fault(method: str, to: str) -> str | None:
    """Return why results of `method` are not exported to the form `to`; None where they are."""
    own = [form.name for form in info(method).forms]
    if not own:
        return f"to: a checkpoint of {method} {info(method).no_forms}"
    if to in (*own, "auto"):
        return None
    return f"to '{to}' holds {forms()[to][0].exported_from}; of {method} choose one of {', '.join(own)}, auto"


@dataclass(frozen=True)
class ExportStage(Settings):
    """Another form of the result."""

    fault = RecipeError

    to: Annotated[str, Option("A form such as lora, or auto.", "FORM", parse=known_form, also=str)]
    output: Annotated[
        Takes[str | None, str | PurePath | None],
        Option("Folder to write.", "OUT", default="beside the checkpoint"),
    ] = default(None)

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
