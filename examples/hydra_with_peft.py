"""Train a Hydra adapter with peft on a text, save it, and merge it into a plain checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mhconvert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a Hub id")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    config = mhconvert.HydraConfig(r_par=4, r_seq=4, target_modules=["o_proj", "down_proj"])
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"]
    rows = ids[0, : ids.shape[1] // args.length * args.length].view(-1, args.length)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for step in range(args.steps):
        row = rows[step % len(rows)].unsqueeze(0)
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    model.save_pretrained(args.output)

    merged = mhconvert.merge(str(args.output), f"{args.output}-merged", base=args.model)
    print(f"{merged['modules']} modules merged into {merged['output']}")


if __name__ == "__main__":
    main()
