"""Opens the student and the teacher of a healing run, and makes every check that needs no weights."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from mhconvert.errors import HealError, MhconvertError
from mhconvert.progress import Listener, Progress

from ..convert import open_model
from ..convert.bare_process.reload import PROMPT
from ..convert.checkpoint import chain, identity
from ..convert.checkpoint.provenance import read_record
from ..convert.recipe.heal_settings import HealSettings
from ..convert.storage import folder_kind, output_folder
from ..convert.storage.linked_files import own_files
from ..convert.storage.safetensors_reader import SafetensorsSource
from . import fusion, heal_text, routing, schedule
from .metrics import require_tensorboard
from .resumable_run import disk_needed


@dataclass(frozen=True)
class Run:
    """The arguments of one healing run."""

    checkpoint: str
    settings: HealSettings
    output: Path
    resume: bool = False
    force: bool = False
    verify: bool = True
    tensorboard: Path | None = None
    trust_remote_code: bool = False


def open_both(
    asked: Run, accelerator: Accelerator, on_progress: Listener
) -> tuple[open_model.OpenModel, open_model.OpenModel]:
    """(student, teacher), opened without reading weights.

    Raises:
        MhconvertError: the checkpoint, the teacher and the settings do not fit together.
    """
    settings, place = asked.settings, str(accelerator.device)
    if asked.tensorboard is not None:
        require_tensorboard()
    folder = Path(asked.checkpoint)
    open_model.require_folder(asked.checkpoint)
    converted = identity.made_by(asked.checkpoint) or chain.methods(folder)
    if not converted and not folder_kind.is_adapter(folder):
        raise HealError(
            f"{asked.checkpoint} is not a checkpoint that mhconvert wrote; convert a donor first: "
            f"mhconvert {asked.checkpoint} --to mla"
        )
    heal_text.check(settings)
    student = open_model.open_model(asked.checkpoint, device=place, trust_remote_code=asked.trust_remote_code)
    fusion.check(student.config, settings.fusion)
    routing.check(student.config, settings)
    if settings.fusion and accelerator.distributed_type is DistributedType.FSDP:
        raise HealError("fusion mixes whole heads, which FSDP divides: use one process or DDP for it")
    if settings.on_policy and accelerator.distributed_type is DistributedType.FSDP:
        raise HealError(
            "text is written by a whole student, which FSDP divides: use one process or DDP for on_policy"
        )
    if student.adapter is not None:
        _require_adapter_settings(student.adapter.method, settings)
    reference = settings.teacher or _recorded_donor(asked.checkpoint)
    on_progress(Progress("donor", 0, 1, reference))
    teacher = open_model.open_model(reference, device=place, trust_remote_code=asked.trust_remote_code)
    _require_one_tokenizer(student, teacher)
    if settings.layer_tokens or settings.loss.get("hidden"):
        _require_same_shape(student, teacher)
    return student, teacher


def _recorded_donor(checkpoint: str) -> str:
    """The reference of the donor in the checkpoint's record; raises HealError if there is none, or if an adapter is
    merged behind it: the donor does not have what was trained."""
    try:
        reference = open_model.recorded_donor(checkpoint)
    except MhconvertError as error:
        raise HealError(
            f"{checkpoint} does not say what it was made from; name the donor with --teacher"
        ) from error
    if "merged" in read_record(Path(checkpoint)):
        raise HealError(
            f"{checkpoint} has an adapter merged into it, and {reference}, which it was merged into, would teach it to "
            "undo what was trained; name with --teacher a model that has learnt the same, or heal the base before an "
            "adapter is trained on it"
        )
    return reference


def _require_same_shape(student: open_model.OpenModel, teacher: open_model.OpenModel) -> None:
    """Raises HealError if the layers of the two models cannot be compared one by one."""
    for name in ("num_hidden_layers", "hidden_size"):
        own, other = (getattr(model.config.get_text_config(), name) for model in (student, teacher))
        if own != other:
            raise HealError(
                f"layers cannot be compared one by one: {name} is {other} in the teacher {teacher.reference} and "
                f"{own} in {student.reference}; leave out --layer-tokens and the loss's hidden, or take the donor as "
                "the teacher"
            )


def _require_adapter_settings(method: str, settings: HealSettings) -> None:
    """Raises HealError for settings with which an existing adapter cannot be trained."""
    if settings.train != method:
        raise HealError(f"this is a {method} adapter, and its matrices are what trains: use --train {method}")
    if settings.layer_tokens:
        raise HealError(
            "--layer-tokens is for converted checkpoints; an adapter's base has the teacher's layers"
        )
    if settings.teacher is None and not settings.loss.get("ce"):
        raise HealError(
            "an adapter begins as its base model and has nothing to learn from it: teach it the text with --loss ce, "
            "or name a --teacher"
        )


def check_output(asked: Run, student: open_model.OpenModel, teacher: open_model.OpenModel) -> None:
    """Raises OutputError unless the output may be written: not over a model that is read, except with --force over
    the checkpoint itself. CheckpointError as `own_files` does.
    """
    checkpoint = Path(asked.checkpoint)
    own_files(checkpoint)
    read = [model.donor.folder for model in (student, teacher) if model.donor is not None]
    read += [Path(teacher.reference)]
    with suppress(MhconvertError):  # a donor that is not recorded here cannot be overwritten
        read += [Path(open_model.recorded_donor(asked.checkpoint))]
    if asked.output.resolve() != checkpoint.resolve():
        read.append(checkpoint)
    output_folder.check_free(asked.output, asked.force, *read)


def _require_one_tokenizer(student: open_model.OpenModel, teacher: open_model.OpenModel) -> None:
    """Raises HealError unless both models have the same vocabulary and split a sample text alike."""
    tokenizers = (student.tokenizer(), teacher.tokenizer())
    own, taught = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if own == taught:
        probes = (tokenizer(PROMPT, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers)
        if next(probes) != next(probes):
            raise HealError(
                f"the teacher {teacher.reference} splits text into other tokens than {student.reference}; distillation "
                "needs a teacher of the same tokenizer"
            )
        return
    other = next(token for token in {**own, **taught} if own.get(token) != taught.get(token))
    raise HealError(
        f"the teacher {teacher.reference} has another tokenizer than {student.reference} (token {other!r} is "
        f"{taught.get(other)} there and {own.get(other)} here); distillation needs a teacher of the same tokenizer"
    )


def longest_row(*models: open_model.OpenModel) -> int | None:
    """The longest context, in tokens, that all models can read; None if no config limits it."""
    limits = [getattr(each.config.get_text_config(), "max_position_embeddings", None) for each in models]
    return min((limit for limit in limits if limit), default=None)


def needed_bytes(
    student: open_model.OpenModel,
    source: SafetensorsSource | None,
    steps: schedule.Steps,
    settings: HealSettings,
) -> int:
    """The bytes of disk space that the run needs.

    Args:
        source: the checkpoint's tensors; None for an adapter.
    """
    tokens = steps.rows * steps.length
    if student.adapter is not None and student.donor is not None:
        base = sum(math.prod(shape) for shape in student.donor.shapes().values())
        trained = sum(math.prod(tensor.shape) for tensor in student.adapter.stored.values())
        return disk_needed(base + trained, trained, 4 * trained, tokens)
    assert source is not None
    sizes = {name: source.nbytes(name) // source.dtype(name).itemsize for name in source.names()}
    trained = sum(size for name, size in sizes.items() if settings.train == "all" or ".self_attn." in name)
    written = sum(source.nbytes(name) for name in source.names())
    return disk_needed(sum(sizes.values()), trained, written, tokens)
