"""Run by a Python that has llama-cpp-python: {"file", "ids", "texts"} as JSON -> logits (.npy) and tokens (JSON)."""

import json
import sys

import numpy as np
from llama_cpp import Llama

wanted = json.loads(sys.argv[1])
llama = Llama(
    wanted["file"], n_ctx=len(wanted["ids"]) or 64, n_batch=512, logits_all=True, n_threads=1, n_threads_batch=1,
    verbose=False,
)  # fmt: skip
if wanted["ids"]:
    llama.eval(wanted["ids"])
    np.save(wanted["logits"], llama.scores[: llama.n_tokens])
tokens = [llama.tokenize(text.encode(), add_bos=True, special=True) for text in wanted["texts"]]
print(json.dumps({"tokens": tokens, "bos": llama.token_bos(), "eos": llama.token_eos()}))
