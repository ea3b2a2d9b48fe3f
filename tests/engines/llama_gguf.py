"""A folder of class Llama as a GGUF file, as llama.cpp's converter writes it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from mhconvert.convert.export.mla.gguf_tokenizer import read_vocabulary
from tests.donors import gguf_arrays, write_gguf_facts

KINDS = {kind.name.lower(): kind for kind in gguf.GGMLQuantizationType}


def write_llama(folder: Path, file: Path, kind: str) -> Path:
    """Write the model in `folder` with matrices of `kind` (f32, f16, q8_0), and return `file`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(str(file), "llama")
    write_gguf_facts(writer, model.config)
    read_vocabulary(folder, model.config.vocab_size).add_to(writer)
    for name, array in gguf_arrays(model).items():
        if array.ndim == 1:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            made = gguf.quants.quantize(array.astype(np.float32), KINDS[kind])
            writer.add_tensor(name, made, raw_dtype=KINDS[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
