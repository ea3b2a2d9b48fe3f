"""Adapters while they train: gradients, dropout, checkpointing, and the trainers that people use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader

from mhconvert.convert.methods.hydra import HydraConfig
from tests.convert.methods.hydra.adapted import (
    adapted,
    base_weights,
    inputs,
    layers,
    llama,
    mlp,
    randomise,
    tokens,
)
from tests.donors import make_donor


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_first_gradient_is_the_up_matrices_alone() -> None:
    model = get_peft_model(llama(attention_bias=True), HydraConfig())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = gradients(model)
    adapter = {name for name, _ in model.named_parameters() if "hydra_" in name}
    assert set(found) == adapter
    assert all((found[name] == 0).all() for name in adapter if "_A." in name)
    assert all((found[name] != 0).any() for name in adapter if "_B." in name)


def test_gradients_are_those_of_the_formula() -> None:
    model = adapted(mlp(), target_modules=["lin1"])
    [layer] = layers(model)
    names = ("hydra_par_A", "hydra_par_B", "hydra_seq_A", "hydra_seq_B")
    x = torch.randn(6, 20, dtype=torch.float64)

    def output(par_a: Tensor, par_b: Tensor, seq_a: Tensor, seq_b: Tensor) -> Tensor:
        base = layer.get_base_layer()
        y0 = x @ base.weight.T + base.bias
        return y0 + 0.7 * (x @ par_a.T @ par_b.T + y0 @ seq_a.T @ seq_b.T)

    matrices = [getattr(layer, name)["default"] for name in names]
    expected = torch.autograd.grad(output(*matrices).square().sum(), matrices)
    found = torch.autograd.grad(layer(x).square().sum(), matrices)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()


def test_only_the_active_adapter_trains() -> None:
    model = get_peft_model(mlp(), HydraConfig(target_modules=["lin0"]))
    model.add_adapter("second", HydraConfig(target_modules=["lin0"]))
    model.set_adapter("second")
    model(inputs()).sum().backward()
    assert all(".second" in name for name in gradients(model))


def test_dropout_is_between_the_matrices_and_only_in_training() -> None:
    model = adapted(mlp(), target_modules=["lin1"], dropout=0.5)
    [layer], x = layers(model), torch.randn(4, 20, dtype=torch.float64)
    still = layer(x)
    assert torch.equal(layer(x), still)
    model.train()
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    inner = torch.nn.functional.dropout(x @ layer.hydra_par_A["default"].T, 0.5)
    y0 = layer.get_base_layer()(x)
    expected = y0 + 0.7 * inner @ layer.hydra_par_B["default"].T
    inner = torch.nn.functional.dropout(y0 @ layer.hydra_seq_A["default"].T, 0.5)
    expected = expected + 0.7 * inner @ layer.hydra_seq_B["default"].T
    assert (first - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    base = llama()
    plain, thrifty = adapted(base).train(), adapted(base).train()
    thrifty.enable_input_require_grads()
    thrifty.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, thrifty):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    expected, found = gradients(plain), gradients(thrifty)
    assert set(expected) == set(found)
    assert all((found[name] - g).abs().max() <= 1e-6 * g.abs().max() for name, g in expected.items())


def test_generation_with_a_cache() -> None:
    model = adapted(llama(), task_type="CAUSAL_LM")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    before = model.generate(input_ids=tokens(), **options)
    assert torch.equal(model.generate(input_ids=tokens(), use_cache=False, **options), before)
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=tokens(), **options), before)


def test_torch_compile() -> None:
    model = adapted(mlp(dtype=torch.float32), target_modules=["lin0", "lin1"])
    x = inputs(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (compiled(x) - model(x)).abs().max() <= 1e-6


@pytest.mark.parametrize("steps", [1, 2])
def test_accelerate(steps: int, tmp_path: Path) -> None:
    """prepare, accumulate, clip, save_state and load_state, unwrap: a loop as accelerate's users write it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    model = get_peft_model(llama(), HydraConfig(task_type="CAUSAL_LM"))
    before = base_weights(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = DataLoader(list(tokens(8)), batch_size=2)
    wrapped, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    losses = []
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(input_ids=batch, labels=batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(torch.equal(weight, before[name]) for name, weight in base_weights(model).items())
    accelerator.save_state(str(tmp_path / "state"))
    expected = model.eval()(tokens()).logits
    randomise(model, 9)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(model(tokens()).logits, expected)
    accelerator.unwrap_model(wrapped).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(llama(), HydraConfig(task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter_config.json").is_file()
    assert "import mhconvert first" in (tmp_path / "checkpoint-2" / "README.md").read_text()
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_trl(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    donor = make_donor(tmp_path / "tiny")
    rows = Dataset.from_dict({"text": [f"{n} boats came home past the town." for n in range(8)]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=32,
        learning_rate=1e-2,
    )
    trainer = trl.SFTTrainer(
        model=str(donor),
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(donor),
        peft_config=HydraConfig(task_type="CAUSAL_LM"),
    )
    assert len(layers(trainer.model)) == 4
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    moved = [layer.hydra_par_B["default"].abs().max().item() for layer in layers(trainer.model)]
    assert min(moved) > 0
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
