"""Convert a model to latent attention, then load the result with plain transformers."""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import mhconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--method", default="mla", choices=["mla", "dha", "moh"])
    parser.add_argument("--effort", default="quick", choices=["quick", "default", "high"])
    parser.add_argument("--tokens", type=int, default=None, help="calibration tokens")
    parser.add_argument("--length", type=int, default=None, help="tokens of a calibration row")
    args = parser.parse_args()

    recipe = mhconvert.Recipe(
        model=args.model,
        method=args.method,
        output=args.output,
        effort=args.effort,
        calibration=mhconvert.Calibration(tokens=args.tokens, sequence_length=args.length),
    )
    report = mhconvert.convert(recipe)
    cache, perplexity = report["kv_bytes_per_token"], report["perplexity"]
    print(f"KV cache: {cache['donor']} → {cache['converted']} bytes a token")
    print(f"perplexity: {perplexity['donor']:.2f} → {perplexity['converted']:.2f}, KL {report['kl']:.4f}")

    model = AutoModelForCausalLM.from_pretrained(args.output, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    ids = tokenizer("The cache of a transformer", return_tensors="pt")
    print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))


if __name__ == "__main__":
    main()
