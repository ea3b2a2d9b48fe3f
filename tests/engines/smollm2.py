"""SmolLM2-135M's own weights and what is made of them for engines, where the model is on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mhconvert.convert.donor.aliases import WHEEL_MODELS
from mhconvert.convert.donor.wheel_download import cache_folder
from mhconvert.convert.open_model import open_model
from tests.conftest import Cli
from tests.engines.exported_forms import Folders

ALIAS = "smollm2-135m"
LAYERS, KV_HEADS, WIDTH = 30, 3, 64
DONOR = 2 * KV_HEADS * WIDTH * LAYERS  # elements of its cache for a token
TEXT = Path(__file__).parents[2] / "docs" / "measured.md"
CALIBRATION = (
    *("--effort", "quick", "--calibration", TEXT),
    *("--calibration-tokens", 2048, "--sequence-length", 256),
)
SENTENCES = (
    "Plants make food from light",
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the air is thinner, and so it boils at a "
    "lower temperature, which is why pasta takes longer to cook there. To keep the time short, a cook may",
)


class SmolLM2(Folders):
    """Folders made by the command line when they are first asked for."""

    def __init__(self, cli: Cli, place: Path):
        """Skips the test where the model is neither in the cache nor had from the Hub before."""
        super().__init__(cli, place)
        if not (cache_folder() / Path(WHEEL_MODELS[ALIAS].member).name).is_file():
            pytest.skip(f"{cache_folder()} has no {ALIAS}: a conversion of it fetches it")

    @property
    def donor(self) -> Path:
        """The donor as safetensors in float32, with its tokenizer."""
        return self.once("smollm2", self._save_donor)

    def _save_donor(self, path: Path) -> None:
        opened = open_model(ALIAS, device="cpu")
        opened.model(torch.float32).save_pretrained(path)
        opened.tokenizer().save_pretrained(path)

    @property
    def prompts(self) -> list[list[int]]:
        """SENTENCES as token ids."""
        tokenizer = AutoTokenizer.from_pretrained(self.donor)
        return [tokenizer.encode(sentence) for sentence in SENTENCES]

    @property
    def portable(self) -> Path:
        """An mla checkpoint with the row of 128 + 64 that half the cache allows, which no kernel of vLLM takes."""
        words = (self.donor, "--to", "mla", "--profile", "portable", *CALIBRATION)
        return self.once("smollm2-mla", lambda path: self.run(*words, "-o", path))

    @property
    def latent(self) -> Path:
        """The deepseek_v3 export with its latent widened to the row that vLLM's kernel for CPUs takes."""
        return self.exported(self.portable, "deepseek_v3", "--pad-row", 576)

    @property
    def uniform(self) -> Path:
        """One KV head of three in each layer, in the donor's own class."""
        words = (self.donor, "--to", "dha", "--uniform", "--kv-budget", 0.34, *CALIBRATION)
        return self.once("smollm2-dha", lambda path: self.run(*words, "-o", path))
