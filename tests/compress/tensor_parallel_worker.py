"""One process of a pair: a column-parallel and a row-parallel linear under 2:4 masks and int8, forward and backward.

    python tensor_parallel_worker.py RANK WORLD_SIZE FOLDER

Writes ``WORLD_SIZE-RANK.pt``: output, masks, scales and their gradients. Started by test_tensor_parallel.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from squeezoo.compress.attach import INPUT_QUANTIZER, attach_, compressed_weights, latent_OI, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.finetune import give_scales_their_rate_
from squeezoo.compress.plan import Plan, PlannedGemm
from squeezoo.compress.tensor_parallel import check_shards, equal_rates_, shard_OI, share_scales_, split_of
from standins import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

WIDTH, FFN = 16, 64
LSQ = {"method": "lsq", "bits": 8}


class SumForward(torch.autograd.Function):
    """What Megatron puts behind a row-parallel product: the sum over processes; its gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class SumBackward(torch.autograd.Function):
    """What Megatron's column-parallel product does to its input's gradient: the sum over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class Column(ColumnParallelLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(SumBackward.apply(x))


class FeedForward(nn.Module):
    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.up = Column(WIDTH, FFN, world_size)
        self.down = RowParallelLinear(FFN, WIDTH, world_size)

    def forward(self, x: Tensor) -> Tensor:
        return SumForward.apply(self.down(torch.nn.functional.gelu(self.up(x)[0]))[0])


def whole() -> dict[str, Tensor]:
    """The whole matrices. All of `down` that the second process holds of row 0 is zero: it alone would give scale 1."""
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(FFN, WIDTH, generator=generator) / 4, torch.randn(WIDTH, FFN, generator=generator) / 8
    down[0, FFN // 2 :] = 0
    return {"up": up, "down": down}


def planned(model: nn.Module, **changes: Any) -> Plan:
    gemms = []
    for name, role in (("up", "ffn_up"), ("down", "ffn_down")):
        shape = tuple(model.get_submodule(name).weight.shape)
        fields = dict(sparsity="2:4", weight=LSQ, input=LSQ) | changes
        gemms.append(PlannedGemm(name, role, 0, shape, "out_in", 1, input_owner=name, accelerated=False, reason="",
                                 **fields))  # fmt: skip
    return Plan("test", "test", tuple(gemms))


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / f'meet-{world_size}'}", rank=rank, world_size=world_size
    )
    model = FeedForward(world_size)
    with torch.no_grad():
        for name, tensor in whole().items():
            module = model.get_submodule(name)
            module.weight.copy_(shard_OI(tensor, split_of(module), rank, world_size))
    plan = planned(model)
    check_shards(plan, model)
    attach_(model, plan)
    share_scales_(model, dist.group.WORLD)
    prune_(model)
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(4))
    calibrate_(model, [{"x": x}], call=lambda m, batch: m(batch["x"]))
    output = model.train()(x)
    output.square().mean().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    give_scales_their_rate_(optimizer, model)
    equal_rates_(optimizer, model, dist.group.WORLD)
    rates = {id(p): entry["lr"] for entry in optimizer.param_groups for p in entry["params"]}
    found: dict[str, Any] = {"output": output.detach()}
    for name, module, weight in compressed_weights(model):
        inputs = module._modules[INPUT_QUANTIZER]
        found[name] = {
            "mask": weight.mask_OI, "latent": latent_OI(module, weight).grad, "scale": weight.quantizer.scale.detach(),
            "step": weight.quantizer.scale.grad, "input": inputs.scale.detach(), "input_step": inputs.scale.grad,
            "rate": rates[id(weight.quantizer.scale)],
        }  # fmt: skip
    torch.save(found, folder / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
