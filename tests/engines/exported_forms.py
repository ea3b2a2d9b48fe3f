"""Every form that `mhconvert` makes for engines, of random Llamas whose logits are spread like a trained model's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.conftest import Cli
from tests.convert.conversions import LLAMA3
from tests.donors import TEXT, make_config, make_tokenizer

LAYERS = 3
PROMPT_LENGTHS = (7, 40, 100)
NEW_TOKENS = 16
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with Llama 3's rope": {"rope": LLAMA3},
    "llama with biases": {"attention_bias": True},
    "qwen2": {"family": "qwen2"},
}


def prompts(vocab: int = 320) -> list[list[int]]:
    """Rows of token ids, none of them special."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


class Folders:
    """Folders in `place`, each made by the command line when it is first asked for."""

    def __init__(self, cli: Cli, place: Path):
        self._cli, self._place = cli, place

    def exported(self, source: Path, to: str, *words: object) -> Path:
        """The export of `source` in the form `to`, proven in plain transformers as every export is."""
        name = "-".join([source.name, to, *(str(word).strip("-") for word in words)])
        return self.once(name, lambda path: self.run("export", source, "--to", to, "-o", path, *words))

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder or file `name`, which `make` writes if it is not there."""
        path = self._place / name
        if not path.exists():
            make(path)
        return path

    def run(self, *words: object) -> None:
        """Run `mhconvert WORD ...`, which must succeed."""
        done = self._cli(*words, "--quiet")
        assert done.returncode == 0, done.stderr


class Forms(Folders):
    """Every form of random donors of 8 heads of `width` elements, made for texts of `positions` tokens."""

    def __init__(self, cli: Cli, place: Path, positions: int = 512):
        super().__init__(cli, place)
        self._positions = positions

    def donor(self, width: int, kind: str = "llama") -> Path:
        """A random model of one of KINDS with 8 query heads and 8 KV heads of `width` elements."""
        config = {"max_position_embeddings": self._positions} | KINDS[kind]
        return self.once(f"donor-{width}-{kind}", lambda path: save_donor(path, width, **config))

    def portable(self, width: int, budget: float, kind: str = "llama") -> Path:
        words = ("--to", "mla", "--profile", "portable", "--kv-budget", budget)
        return self._converted(f"portable-{width}-{kind}", self.donor(width, kind), *words)

    def dha(self, *words: object) -> Path:
        return self._converted(
            "-".join(["dha", *(str(w).strip("-") for w in words)]), self.donor(128), "--to", "dha", *words
        )

    @cached_property
    def adapter(self) -> Path:
        """A Hydra adapter with random weights of both branches."""
        path = self._place / "adapter"
        self.run(self.donor(128), "--to", "hydra", "-o", path)
        tensors = load_file(path / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(2)
        made = {
            name: torch.randn(t.shape, generator=generator) * t.shape[-1] ** -0.5 / 2
            for name, t in tensors.items()
        }
        save_file(made, path / "adapter_model.safetensors", {"format": "pt"})
        return path

    @property
    def merged(self) -> Path:
        return self.once("merged", lambda path: self.run("merge", self.adapter, "-o", path))

    def gguf(self, source: Path, kind: str) -> Path:
        """The export of `source` as a GGUF file with matrices of `kind`."""
        words = ("export", source, "--to", "gguf", "--kind", kind, "-o")
        return self.once(f"{source.name}-{kind}.gguf", lambda path: self.run(*words, path))

    def _converted(self, name: str, donor: Path, *words: object) -> Path:
        text = self.once("text.txt", lambda path: path.write_text(TEXT * 40, encoding="utf-8"))
        more = (
            "--effort",
            "quick",
            "--calibration",
            text,
            "--calibration-tokens",
            1024,
            "--sequence-length",
            128,
        )
        return self.once(name, lambda path: self.run(donor, *words, *more, "-o", path))


def save_donor(path: Path, width: int, **config: Any) -> None:
    """A model of LAYERS layers, 8 query heads and 8 KV heads of `width` elements, with a tokenizer."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "heads": 8,
        "kv_heads": 8,
        "head_dim": width,
        "hidden": 8 * width,
        "layers": LAYERS,
    }
    model = AutoModelForCausalLM.from_config(make_config(**shape, tied=False, **config))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


@torch.no_grad()
def in_transformers(
    folder: Path, rows: list[list[int]], new: int = NEW_TOKENS
) -> tuple[list[Tensor], list[list[int]]]:
    """Log-probabilities of each row's tokens from the second on, and its greedy continuation; float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    scores, texts = [], []
    for row in rows:
        ids = torch.tensor([row])
        of_next = model(ids).logits[0, :-1].log_softmax(-1)
        scores.append(of_next.gather(1, ids[0, 1:, None])[:, 0])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        texts.append(made[0, len(row) :].tolist())
    return scores, texts
