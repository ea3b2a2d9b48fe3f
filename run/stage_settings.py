"""What a recipe may say about the stages behind the conversion: evaluation, export, push."""

from __future__ import annotations

from dataclasses import dataclass

from mhconvert.errors import RecipeError


@dataclass(frozen=True)
class ExportStage:
    """Another form of the result. to: a form or an engine, such as lora. output: its folder (None: beside it)."""

    to: str
    output: str | None = None

    def __post_init__(self) -> None:
        if not self.to.strip():
            raise RecipeError("to is empty; name a form such as lora")
        if self.output is not None and not self.output.strip():
            raise RecipeError("output is empty; name a folder, or leave it out")


@dataclass(frozen=True)
class PushStage:
    """Upload of the result to the Hugging Face Hub.

    repo: owner/name, or a name of one's own. private: whether a repository that is made for it is seen by others.
    revision: a branch (None: main).
    """

    repo: str
    private: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise RecipeError(f"repo '{self.repo}' is no name of a repository: {error}") from error
        if self.revision is not None and not self.revision.strip():
            raise RecipeError("revision is empty; name a branch, or leave it out")
