"""`llama-server` from xllamacpp, which has llama.cpp's server but not its command line: the options used here."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib.metadata import version

import xllamacpp

CACHES = {
    "f32": xllamacpp.ggml_type.GGML_TYPE_F32,
    "f16": xllamacpp.ggml_type.GGML_TYPE_F16,
    "bf16": xllamacpp.ggml_type.GGML_TYPE_BF16,
    "q8_0": xllamacpp.ggml_type.GGML_TYPE_Q8_0,
}
FLASH = {
    "on": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    "auto": xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_AUTO,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="llama-server")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("-m", "--model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-c", "--ctx-size", type=int, default=0)
    parser.add_argument("-np", "--parallel", type=int, default=1)
    parser.add_argument("-t", "--threads", type=int, default=-1)
    parser.add_argument("-lv", "--verbosity", type=int, default=3)
    parser.add_argument("-ctk", "--cache-type-k", choices=CACHES, default="f16")
    parser.add_argument("-ctv", "--cache-type-v", choices=CACHES, default="f16")
    parser.add_argument("-fa", "--flash-attn", choices=FLASH, default="auto")
    asked = parser.parse_args()
    if asked.version:
        built = version("xllamacpp")
        print(f"version: {built.rsplit('.', 1)[-1]} (xllamacpp {built})", file=sys.stderr)
        return
    if asked.model is None:
        parser.error("--model is missing")
    _serve(asked)


def _serve(asked: argparse.Namespace) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = asked.model
    params.hostnames, params.port = [asked.host], asked.port
    params.n_ctx, params.n_parallel, params.verbosity = asked.ctx_size, asked.parallel, asked.verbosity
    params.cache_type_k, params.cache_type_v = CACHES[asked.cache_type_k], CACHES[asked.cache_type_v]
    params.flash_attn_type = FLASH[asked.flash_attn]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.threads
    params.fit_params = params.warmup = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = xllamacpp.Server(params)
    print(f"listening on {server.listening_address}", file=sys.stderr, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
