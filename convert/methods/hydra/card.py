"""How to load a saved adapter, for its README.md."""

from __future__ import annotations

from pathlib import Path

MARK = "## Load this Hydra adapter"


def notice(base: str | None) -> str:
    """How to load an adapter of the model `base`, and what to do about `KeyError: 'HYDRA'`; Markdown."""
    file = Path(base or "BASE")
    name = f'{file.parent}", gguf_file="{file.name}' if file.suffix == ".gguf" else base or "BASE"
    return f"""{MARK}

Hydra is not one of peft's own methods: **import mhconvert first**, in every process that loads this folder.

```python
from mhconvert import HydraConfig  # makes peft know the method
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), "THIS_FOLDER")
```

`KeyError: 'HYDRA'` means that the import is missing, or mhconvert is not installed.

Where mhconvert cannot be had, make something that needs nothing of it, once and elsewhere:

    mhconvert merge THIS_FOLDER -o OUT               a plain checkpoint
    mhconvert export THIS_FOLDER --to lora -o OUT    the same adapter as a LoRA
"""


def add_notice(folder: Path, base: str | None) -> None:
    """Put the notice into README.md of `folder`, after its front matter, unless it is there already."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    if MARK in text:
        return
    head, body = "", text
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        end = text.index("\n---\n", 4) + len("\n---\n")
        head, body = text[:end] + "\n", text[end:].lstrip("\n")
    path.write_text("\n".join(part for part in (head + notice(base), body) if part), encoding="utf-8")
