"""Open a model for measuring: a converted checkpoint by the package's own classes, an adapter on its base model,
anything else as a donor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from mhconvert.device import pick_device
from mhconvert.errors import CheckpointError, MhconvertError

from .bare_process.child import keep_token_ids
from .checkpoint import chain
from .checkpoint.fingerprint import Hash, of_folder, of_place
from .checkpoint.identity import converted_method, exported
from .checkpoint.provenance import read_record, require_recorded_tokenizer
from .donor import hub_download
from .donor.aliases import ALIASES
from .donor.config_check import require_config, require_padding
from .donor.donor import Donor, open_donor
from .donor.reference import HUB_ID
from .donor.tokenizer_files import load_tokenizer
from .methods.registry import register
from .storage.atomic_files import sha256
from .storage.folder_kind import is_adapter
from .storage.output_folder import require_finished
from .storage.safetensors_reader import SafetensorsSource, read_json, require_finite

if TYPE_CHECKING:
    from .adapters.saved_adapter import AdapterFolder
    from .recipe.recipe import Recipe


@dataclass
class OpenModel:
    """A model whose config is known and whose weights are read when `model` is called. Eval mode."""

    reference: str
    config: Any
    device: str
    donor: Donor | None
    trust_remote_code: bool = False
    adapter: AdapterFolder | None = None
    place: Path | None = None

    @property
    def folder(self) -> Path:
        """Where a converted checkpoint's files are."""
        return self.place if self.place is not None else Path(self.reference)

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises CheckpointError when there is none that can be read."""
        if self.donor is not None:
            return self.donor.tokenizer()
        return load_tokenizer(self.folder, self.trust_remote_code)

    def require_tokenizer(self) -> None:
        """Raises CheckpointError for a damaged tokenizer, and for one that is gone from a converted checkpoint."""
        if self.donor is None:
            require_recorded_tokenizer(self.folder)
        else:
            self.donor.check_files(tokenizer=True)

    def model(self, dtype: torch.dtype = torch.float32, *, trainable: bool = False) -> Any:
        """The whole model on the device; `trainable`: an adapter's matrices require gradients.

        Raises CheckpointError for weights that are missing, damaged or not finite.
        """
        if self.donor is not None:
            return self._with_adapter(self.donor.model(torch.device(self.device), dtype), trainable).eval()
        from transformers import AutoModelForCausalLM

        SafetensorsSource(self.folder)  # whose errors name the file
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.reference} does not load: {_first_line(error)}") from error
        except (
            AttributeError,
            TypeError,
            KeyError,
            IndexError,
        ) as error:  # what a class makes of an odd config
            file = self.folder / "config.json"
            raise CheckpointError(
                f"{file} does not describe a model of its class: {_first_line(error)}"
            ) from error
        model, loading = opened
        for fault in ("missing", "unexpected", "mismatched"):  # transformers would go on with random weights
            for name in sorted(map(str, loading[f"{fault}_keys"])):
                raise CheckpointError(f"{self.reference} does not fit its config: tensor {name} is {fault}")
        for name, weight in model.named_parameters():
            require_finite(weight.detach(), name, self.folder)
        keep_token_ids(model)
        return model.to(self.device).eval()

    def _with_adapter(self, base: Any, trainable: bool) -> Any:
        """`base` with the adapter on it as peft loads it, not merged; `base` itself where there is none."""
        if self.adapter is None or self.donor is None:
            return base
        from peft import PeftModel

        from .adapters.shape_check import require_fit

        require_fit(self.adapter, self.donor)
        folder = str(self.adapter.folder)
        return PeftModel.from_pretrained(base, folder, torch_device=self.device, is_trainable=trainable)

    @property
    def longest(self) -> int | None:
        """The tokens that the model was made for; None where its config does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def require_length(self, tokens: int) -> None:
        """Raises MhconvertError when `tokens` are more than the model was made for."""
        if self.longest and tokens > self.longest:
            raise MhconvertError(
                f"{self.reference} reads at most {self.longest} tokens and {tokens} are asked for"
            )


def checkpoint_folder(reference: str, *, weights: bool = True) -> Path | None:
    """The folder of a converted checkpoint: `reference` itself, or the snapshot of org/name[@revision] on the Hub.

    None for anything else. weights: whether a snapshot has to have them. Raises CheckpointError where the Hub does not
    give it, and for a folder that is unfinished.
    """
    path = Path(reference).expanduser()
    if reference not in ALIASES:
        require_finished(path)
    if path.exists() or reference in ALIASES or not HUB_ID.fullmatch(reference):
        return path if converted_method(reference) is not None else None
    snapshot = hub_download.download_config(reference)
    if converted_method(str(snapshot)) is None:
        return None
    return hub_download.download_weights(reference, revision=snapshot.name) if weights else snapshot


def _auto_config(folder: Path | str) -> Any:
    """The config of a folder by transformers, once its numbers are in range. Raises CheckpointError naming the file."""
    from transformers import AutoConfig

    require_config(read_json(Path(folder) / "config.json"), Path(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}/config.json does not load: {_first_line(error)}") from error
    require_padding(config.get_text_config(), Path(folder) / "config.json")
    return config


def read_config(folder: str, method: str) -> Any:
    """The config of a converted checkpoint, by the package's classes."""
    register(method)
    return _auto_config(folder)


def open_model(reference: str, *, device: str | None = None, trust_remote_code: bool = False) -> OpenModel:
    """`reference` opened: what mhconvert converted, a folder or org/name[@revision] on the Hub; an adapter's folder; or
    what `open_donor` takes. Reads no weights yet.

    device: a torch device; None: CUDA if present. Code inside a folder runs only with trust_remote_code.
    """
    place = str(pick_device(device))
    folder = checkpoint_folder(reference)
    method = converted_method(str(folder))
    if folder is not None and method is not None:
        config = read_config(str(folder), method)
        return OpenModel(reference, config, place, None, trust_remote_code, place=folder)
    if exported(reference):
        own = Path(reference).expanduser()
        return OpenModel(reference, _auto_config(own), place, None, trust_remote_code, place=own)
    if is_adapter(Path(reference).expanduser()):
        from .adapters.saved_adapter import open_adapter

        adapter = open_adapter(reference)
        donor = open_donor(adapter.base, trust_remote_code=trust_remote_code)
        return OpenModel(reference, donor.config, place, donor, trust_remote_code, adapter)
    donor = open_donor(reference, trust_remote_code=trust_remote_code)
    return OpenModel(reference, donor.config, place, donor, trust_remote_code)


def require_folder(reference: str) -> None:
    """Raises CheckpointError where `reference` can only be a folder, and there is none or an unfinished one."""
    path = Path(reference).expanduser()
    if reference in ALIASES or path.exists():
        return
    require_finished(path)
    if not HUB_ID.fullmatch(reference):
        raise CheckpointError(f"there is no folder {reference}")


def output_folder(recipe: Recipe) -> Path:
    """The folder that the conversion `recipe` writes, its default by the donor's name."""
    return recipe.output_folder(open_donor(recipe.model, trust_remote_code=recipe.trust_remote_code).name)


def recorded_donor(checkpoint: str) -> str:
    """What the checkpoint is measured against, by its record: `chain.measured_model`, or the base model of an adapter,
    merged or not. MhconvertError when there is none."""
    require_folder(checkpoint)
    if is_adapter(Path(checkpoint).expanduser()):
        from .adapters.saved_adapter import open_adapter

        return open_adapter(checkpoint).base
    folder = checkpoint_folder(checkpoint) or Path(checkpoint)
    if (first := chain.measured_model(folder)) is not None:
        return first
    try:
        return str(read_record(folder)["donor"]["reference"])
    except (KeyError, TypeError) as error:
        raise MhconvertError(
            f"{checkpoint} does not say what it was made from; name the donor with --against"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def of_model(opened: OpenModel, hashed: Hash = sha256) -> str:
    """The fingerprint of an opened model, of an adapter with its base; `hashed` as of `fingerprint.of_place`.

    A Hub model's weights are downloaded.
    """
    if opened.donor is None:
        return of_folder(opened.folder, hashed)
    base = of_place(opened.donor.model_files(), hashed)
    if opened.adapter is None:
        return base
    return hashlib.sha256(f"{of_folder(opened.adapter.folder, hashed)} on {base}".encode()).hexdigest()
