"""Writes a dense DeepSeek-V3 checkpoint as one GGUF file for llama.cpp, with its tokenizer, tensor by tensor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    LlamaFileType,
)
from gguf.quants import quantize
from torch import Tensor

from mhconvert.errors import ExportError, OutputError
from mhconvert.progress import Progress, ignore

from ...donor.gguf_reader import ALIGNMENT
from ...storage.disk_space import FULL, check_space, out_of_space
from ...storage.output_folder import PARTIAL
from .gguf_tensors import KEPT, LATENT_EPS, DenseCheckpoint, open_dense, stored_shapes, tensors
from .gguf_tokenizer import read_vocabulary

KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
PLAIN = {  # kinds that are a torch dtype
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
BLOCK_ROWS = 1 << 10  # quantised together, so that a large matrix needs little memory beside itself
SLACK_BYTES = 1 << 20  # metadata but for the tokenizer
SHORT_WRITE = "requested and"  # numpy's error when the disk fills up has no errno


def write(
    folder: Path,
    target: Path,
    kind: str = "bf16",
    *,
    force: bool = False,
    trusted: bool = False,
    on_progress: Callable[[Progress], None] = ignore,
) -> dict[str, Any]:
    """Write the checkpoint in `folder` as the file `target`, which appears when it is complete.

    Args:
        trusted: whether code of the tokenizer may run.
        kind: of the matrices, one of KINDS. Vectors and attn_kv_a_mqa are F32, and rows that q8_0's blocks of 32 do
            not divide are F16.
    Returns:
        output, bytes, kind, tensors (how many of each type) and skipped (steps of the tokenizer that llama.cpp lacks).
    Raises:
        ExportError: naming what deepseek2 or llama.cpp's tokenizers do not have.
        CheckpointError: for a damaged folder.
        OutputError: when `target` exists and not `force`, or the disk cannot hold it.
    """
    if kind not in KINDS:
        raise ExportError(f"'{kind}' is no kind of GGUF; choose one of {', '.join(KINDS)}")
    _require_free(target, force)
    checkpoint = open_dense(folder)
    vocabulary = read_vocabulary(folder, checkpoint.shape.vocab_size, trusted)
    shapes = stored_shapes(checkpoint)
    kinds = {name: _stored_kind(name, dims, KINDS[kind][0]) for name, dims in shapes.items()}
    sizes = {name: _nbytes(dims, kinds[name]) for name, dims in shapes.items()}
    needed = sum(size + ALIGNMENT for size in sizes.values()) + vocabulary.nbytes + SLACK_BYTES
    with _whole_file(target, needed, force=force) as partial:
        writer = GGUFWriter(partial, MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2])
        with contextlib.closing(writer):
            _add_facts(writer, checkpoint, KINDS[kind][1])
            vocabulary.add_to(writer)
            for name, dims in shapes.items():
                writer.add_tensor_info(name, dims, np.dtype(np.float32), sizes[name], raw_dtype=kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, (name, tensor) in enumerate(tensors(checkpoint), 1):
                writer.write_tensor_data(_encoded(name, tensor, kinds[name]))
                on_progress(Progress("export", done, len(shapes)))
    types = [kinds[name].name for name in shapes]
    report: dict[str, Any] = {"output": str(target), "bytes": target.stat().st_size, "kind": kind}
    return report | {
        "tensors": {t: types.count(t) for t in sorted(set(types))},
        "skipped": vocabulary.skipped,
    }


def _require_free(target: Path, force: bool) -> None:
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name a .gguf file with -o")
    if os.path.lexists(target) and not force:
        raise OutputError(f"{target} exists; choose another file with -o, or replace it with --force")


@contextlib.contextmanager
def _whole_file(target: Path, needed: int, *, force: bool) -> Iterator[Path]:
    """The file TARGET.partial to write into; it is renamed to `target`, or removed after an exception."""
    partial = target.with_name(target.name + PARTIAL)
    check_space(target.parent, needed)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if force:
            partial.unlink(missing_ok=True)
        partial.touch(exist_ok=False)
    except FileExistsError as error:
        raise OutputError(
            f"{partial} is there already: another export writes it, or left it when it was cut short; "
            "--force starts over"
        ) from error
    except OSError as error:
        raise OutputError(f"{partial} cannot be written: {error.strerror or error}") from error
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        words = FULL if isinstance(error, OSError) and SHORT_WRITE in str(error) else out_of_space(error)
        if words:
            raise OutputError(
                f"{target} cannot be written: {words}; make room, or choose another -o"
            ) from error
        raise


def _add_facts(writer: GGUFWriter, checkpoint: DenseCheckpoint, file_type: LlamaFileType) -> None:
    shape = checkpoint.shape
    writer.add_type("model")
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_layer_norm_rms_eps(LATENT_EPS)
    writer.add_rope_dimension_count(shape.qk_rope_head_dim)
    writer.add_rope_freq_base(checkpoint.rope_theta)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(1)  # the cache: one head, latent and rotary key
    writer.add_key_length(shape.kv_lora_rank + shape.qk_rope_head_dim)
    writer.add_value_length(shape.kv_lora_rank)
    writer.add_key_length_mla(shape.qk_nope_head_dim + shape.qk_rope_head_dim)
    writer.add_value_length_mla(shape.v_head_dim)
    writer.add_kv_lora_rank(shape.kv_lora_rank)
    # The loader demands the key unless it takes the number of layers for a "lite" model's, and reads 0 as: attn_q.
    writer.add_q_lora_rank(0)
    # Every layer is dense; the loader demands the experts' numbers all the same.
    writer.add_leading_dense_block_count(shape.num_hidden_layers)
    writer.add_expert_feed_forward_length(shape.intermediate_size)
    writer.add_expert_shared_count(0)


def _stored_kind(name: str, dims: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(dims) == 1 or name.endswith(KEPT):
        return GGMLQuantizationType.F32
    return kind if dims[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _nbytes(dims: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(dims)) // block * size


def _encoded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of `tensor` as `kind`."""
    if kind in PLAIN:
        stored = tensor.to(PLAIN[kind]).contiguous()
        if not torch.isfinite(stored).all():
            raise ExportError(f"{name} holds values beyond {kind.name}; choose kind bf16 or q8_0")
        return stored.view(torch.uint8).numpy()
    rows = tensor.reshape(-1, tensor.shape[-1])
    parts = [quantize(block.float().numpy(), kind) for block in rows.split(BLOCK_ROWS)]
    return np.concatenate(parts)
