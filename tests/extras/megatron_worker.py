"""One process of a tensor-parallel group: compress a tiny GPT and train it one step. Started by test_megatron.py.

    python megatron_worker.py RANK WORLD_SIZE FOLDER [alone]

With ``alone`` the processes do not share scales: what goes wrong then.

Process 0 of a group of one writes ``full.pt``, the whole initial model; a larger group reads its shards from it. Each
process writes ``WORLD_SIZE-RANK.pt``: masks, scales, weights by name, the loss before and after one step.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from squeezoo.compress.attach import INPUT_QUANTIZER, attach_, compressed_weights, latent_OI, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.tensor_parallel import check_shards, shard_OI, share_scales_, split_of
from squeezoo.models.megatron_cpu import cpu_megatron
from torch import Tensor, nn

RECIPE = {
    "name": "tp-2-4-int8",
    "description": "2:4 and int8 on every GEMM",
    "source": "test",
    "rules": [
        {
            "roles": ["block", "final"],
            "sparsity": "2:4",
            "weight": {"method": "lsq", "bits": 8},
            "input": {"method": "lsq", "bits": 8},
        }
    ],
    "stages": [{"stage": "prune", "method": "magnitude"}, {"stage": "calibrate", "batches": 2}],
}
VOCABULARY, TOKENS = 64, 16


def tiny_gpt(**config: Any) -> nn.Module:
    """2 blocks, width 32, 4 heads in 2 query groups (so that the rows of linear_qkv interleave), FFN 128, dropout 0."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    made = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, use_cpu_initialization=True,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0, pipeline_dtype=torch.float32, **config,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTModel(
        config=made, transformer_layer_spec=get_gpt_layer_local_spec(), vocab_size=VOCABULARY,
        max_sequence_length=TOKENS, parallel_output=True, share_embeddings_and_output_weights=False,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batches(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (3, TOKENS), generator=generator)} for _ in range(count)]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    later = torch.ones(TOKENS, TOKENS).triu(1).bool()[None, None]
    with cpu_megatron():
        return model(ids, torch.arange(TOKENS).expand_as(ids), later, labels=ids.roll(-1, 1)).mean()


def start(rank: int, world_size: int, folder: Path) -> None:
    from megatron.core import parallel_state

    init = f"file://{folder / f'meet-{world_size}'}"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(world_size)


def load_shards_(model: nn.Module, full: dict[str, Tensor], rank: int, world_size: int) -> None:
    """Put this process's part of the whole model into ``model``; biases of row-parallel linears are whole."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = full[name]
            module, kind = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
            split = "rows" if "word_embeddings" in name else split_of(module)
            if split == "rows" or (split == "columns" and kind == "weight"):
                whole = shard_OI(whole, split, rank, world_size)
            parameter.copy_(whole)


def main(rank: int, world_size: int, folder: Path, alone: bool) -> None:
    torch.set_num_threads(1)
    start(rank, world_size, folder)
    model = tiny_gpt(tensor_model_parallel_size=world_size)
    if world_size == 1:
        torch.save(dict(model.named_parameters()), folder / "full.pt")
    else:
        load_shards_(model, torch.load(folder / "full.pt"), rank, world_size)
    recipe = Recipe.parse(RECIPE)
    plan = make_plan(model, recipe)
    check_shards(plan, model, recipe.stages)
    attach_(model, plan)
    shared = 0 if alone else share_scales_(model, dist.group.WORLD)
    prune_(model)
    calibrate_(model, batches(2), call=loss_of)
    first = {name: weight.quantizer.scale.detach().clone() for name, _, weight in compressed_weights(model)}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    before = loss_of(model, batches(1)[0])
    before.backward()
    optimizer.step()
    after = loss_of(model, batches(1)[0])
    found: dict[str, Any] = {"before": before.detach(), "after": after.detach(), "shared": shared, "first": first}
    for name, module, weight in compressed_weights(model):
        inputs = module._modules[INPUT_QUANTIZER]
        found[name] = {
            "mask": weight.mask_OI, "scale": weight.quantizer.scale.detach(), "input_scale": inputs.scale.detach(),
            "weight": latent_OI(module, weight).detach(), "split": split_of(module),
            "step": weight.quantizer.scale.grad, "input_step": inputs.scale.grad,
        }  # fmt: skip
    torch.save(found, folder / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), alone="alone" in sys.argv[4:])
