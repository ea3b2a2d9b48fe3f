"""A Python with a package `vllm` that computes with transformers: what `eval/vllm/child.py` uses of the real one."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

VERSION = "0.0.stand-in"
MODULE = """
import torch
from types import SimpleNamespace as Namespace
from transformers import AutoModelForCausalLM, AutoTokenizer


class SamplingParams:
    def __init__(self, max_tokens, temperature=1.0, stop=(), prompt_logprobs=None, skip_special_tokens=True, **_):
        assert temperature == 0
        self.max_tokens, self.stop, self.scored = max_tokens, list(stop), prompt_logprobs


class LLM:
    def __init__(self, model, dtype, max_model_len, trust_remote_code=False, **_):
        if "refused" in str(model):
            raise ValueError("Model architectures ['Odd'] are not supported")
        self.length = max_model_len
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        spec = Namespace(page_size_bytes=16 * 64, block_size=16)
        executor = Namespace(get_kv_cache_specs=lambda: [{"layer 0": spec, "layer 1": spec}])
        core = Namespace(engine_core=Namespace(model_executor=executor))
        self.llm_engine = Namespace(engine_core=core)

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm, lora_request):
        print("vLLM prints on stdout")
        return [self.one(p["prompt_token_ids"], s) for p, s in zip(prompts, params, strict=True)]

    def one(self, ids, sampling):
        assert len(ids) + 1 <= self.length, "the row is too long"
        logprobs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        new = self.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=sampling.max_tokens, do_sample=False,
        )[0, len(ids):].tolist()
        text = self.tokenizer.decode(new)
        cut = min((text.find(word) for word in sampling.stop if word in text), default=len(text))
        likely = [None]
        for token, row in zip(ids[1:], logprobs[:-1]):
            shown = {int(row.argmax()), token}  # the best, and the one that is there
            likely.append({each: Namespace(logprob=float(row[each])) for each in shown})
        return Namespace(
            prompt_token_ids=ids, prompt_logprobs=likely if sampling.scored else None,
            outputs=[Namespace(token_ids=new, text=text[:cut])],
        )
"""
PLATFORMS = """
from types import SimpleNamespace

current_platform = SimpleNamespace(is_cpu=lambda: True, device_type="cpu")
"""
LORA = """
class LoRARequest:
    def __init__(self, *_):
        pass
"""
RUN = """\
#!{python} -I
import runpy, sys
sys.path.insert(0, {place!r})
sys.argv = sys.argv[2:]  # of: -I FILE OPTIONS
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_python(place: Path) -> Path:
    """The path of the interpreter, in the folder `place`."""
    files = {
        "vllm/__init__.py": MODULE,
        "vllm/platforms/__init__.py": PLATFORMS,
        "vllm/lora/request.py": LORA,
        f"vllm-{VERSION}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n",
        "python": RUN.format(python=sys.executable, place=str(place)),
    }
    for name, text in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    (place / "python").chmod(0o755)
    return place / "python"
