"""A donor's config.json: read without running code, freed of what its trainer left there, and refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mhconvert.errors import CheckpointError, UnsupportedError

from ..families.facts import FAMILIES
from ..methods.registry import METHODS, register
from ..storage.folder_kind import is_adapter
from ..storage.regular_file import require_regular
from ..storage.safetensors_reader import SafetensorsSource, read_json, weights_present
from .config_check import require_config, require_padding
from .tensor_layout import STORED_DTYPES

# How somebody ran the model, not what it is; each with its default in transformers.
RUNTIME_SWITCHES = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": True,
    "torchscript": False,
    "chunk_size_feed_forward": 0,
}


def read_config(folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The transformers config of a model folder, and sentences for the user about it.

    RUNTIME_SWITCHES have transformers' defaults. A `quantization_config` beside plain weights, which asks transformers
    to quantise them on loading, is left aside.

    Raises:
        CheckpointError: config.json is missing or invalid, a number in it is out of range, or it has more layers than
            the weights.
        UnsupportedError: the model type is unknown.
    """
    file = folder / "config.json"
    values = _stated(folder)
    model_type = values["model_type"]
    require_config(values, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(
            f"{file} is not a valid {model_type} config: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise CheckpointError(
            f"{file} has the config of a part, such as text_config, which {model_type} does not have"
        )
    for name, value in RUNTIME_SWITCHES.items():
        if hasattr(config, name):
            setattr(config, name, value)
    require_padding(config, file)
    if getattr(config, "quantization_config", None) and _has_plain_weights(folder):
        del config.quantization_config
        return config, ("left aside: the quantization_config in its config.json, as its weights are plain",)
    return config, ()


def _stated(folder: Path) -> dict[str, Any]:
    """What the folder's config.json says, with a model_type that transformers knows. Raises as `read_config` does."""
    file = folder / "config.json"
    require_regular(file)
    if not file.is_file():
        if is_adapter(folder):
            raise CheckpointError(
                f"{folder} is an adapter, not a model; make one of it: mhconvert merge {folder}"
            )
        ggufs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
        hint = f"; to use its GGUF give the file itself: {ggufs[0]}" if ggufs else ": not a model folder"
        raise CheckpointError(f"{folder} has no config.json{hint}")
    values = read_json(file)
    model_type = values.get("model_type")
    if model_type is None:
        raise CheckpointError(f"{file} names no model_type; it is not a transformers model")
    if (method := str(model_type).split("_")[0]) in METHODS:
        register(method)  # our own classes; the folder's code does not run
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        record = folder / "mhconvert.json"
        exported = read_json(record).get("exported") if record.is_file() else None
        known = f"the supported ones are {', '.join(sorted(FAMILIES))}"
        if isinstance(exported, dict):
            known = f"it is an export, which ends a chain; convert {exported.get('checkpoint')} instead"
        raise UnsupportedError(f"model type '{model_type}' of {folder} is not supported; {known}")
    return values


def _has_plain_weights(folder: Path) -> bool:
    """Whether the weights in `folder`, where they are at hand, are all floating-point numbers of 16 bits or more."""
    if not weights_present(folder):
        return False
    source = SafetensorsSource(folder)
    return all(source.dtype(name) in STORED_DTYPES for name in source.names())
