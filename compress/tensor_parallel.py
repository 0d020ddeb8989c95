"""Compression of a model whose matrices are split over tensor-parallel processes (Megatron-LM, arXiv:1909.08053).

Each process holds shards and compresses what it holds. What must agree between processes:

* A **column-parallel** matrix [O / p, I] is split between rows (Megatron names the axes of the transpose). N:M groups,
  weight scales and masks belong to single rows, so nothing has to be exchanged. Its input is whole in every process.
* A **row-parallel** matrix [O, I / p] is split inside its rows. A shard must hold whole groups of M. The scale of an
  output channel and the scale of the input are shared by all processes, so their ranges are reduced by max and their
  gradients by sum (ALGORITHMS A.1, D.6).

    check_shards(plan, model, recipe.stages)      # after make_plan, before attach_
    attach_(model, plan)
    share_scales_(model, group)                   # after attach_, before calibrate_
    equal_rates_(optimizer, model, group)         # where scales have learning rates of their own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .attach import INPUT_QUANTIZER, compressed_weights
from .plan import Plan, PlanError, PlannedGemm
from .quantizers import LsqQuantizer
from .stages import Calibrate, Prune, Stage

Split = Literal["rows", "columns"]
_ROW_STATISTICS = ("lsq", "absmax")  # weight quantizers with a scale per output channel


def split_of(module: nn.Module) -> Split | None:
    """Which axis of the module's weight [out_features, in_features] is split over processes; None: neither. Judged by
    the attributes of megatron-core's parallel linears."""
    for split, size in (("rows", "output_size"), ("columns", "input_size")):
        part = getattr(module, f"{size}_per_partition", None)
        if part is not None and part != getattr(module, size):
            return split  # type: ignore[return-value]
    return None


def shard_OI(tensor_OI: Tensor, split: Split | None, rank: int, world_size: int) -> Tensor:
    """The part of a whole matrix, mask or [O, 1] scale that process ``rank`` holds; a view.

    Raises:
        ValueError: the axis cannot be split evenly.
    """
    if split is None:
        return tensor_OI
    axis = 0 if split == "rows" else 1
    size = tensor_OI.shape[axis]
    if axis == 1 and size == 1:
        return tensor_OI  # a scale per output channel: shared by the shards of a row
    if size % world_size:
        raise ValueError(f"expected {split} in a multiple of {world_size} processes, found {size}")
    return tensor_OI.narrow(axis, rank * (size // world_size), size // world_size)


def check_shards(plan: Plan, model: nn.Module, stages: Sequence[Stage] = ()) -> None:
    """Refuse what would give other masks or scales than the same recipe on the whole model. Changes nothing.

    Args:
        plan: made on ``model``, so with the shapes of its shards.
        model: one process's part of a tensor-parallel model, not attached yet.
        stages: of the recipe.

    Raises:
        PlanError: a row-parallel shard would cut a group of M; a sparsity, quantizer or pruning method looks at more
            than a shard; sequence parallelism is on; or Megatron's fused gradient accumulation is, which writes weight
            gradients past the mask.
    """
    modules = dict(model.named_modules())
    wrong = [text for gemm in plan.gemms for text in _problems(gemm, modules[gemm.name], stages)]
    if wrong:
        more = f" ({len(wrong)} such problems)" if len(wrong) > 1 else ""
        raise PlanError(f"this plan cannot be run on tensor-parallel shards: {wrong[0]}{more}. Nothing was changed.")


def check_split(plan: Plan, world_size: int, row_parallel: Sequence[str] = ("attn_out", "ffn_down")) -> None:
    """Asked of the plan of the whole model, before it is split: can it be run on ``world_size`` processes?

    Args:
        row_parallel: roles whose in_features are split; of all others out_features are.

    Raises:
        PlanError: a matrix cannot be split evenly, or a split cuts a group of M; says which sizes would do.
    """
    for gemm in plan.gemms:
        out_features, in_features = gemm.shape
        size, unit = (in_features, _group(gemm)) if gemm.role in row_parallel else (out_features, 1)
        if size % (world_size * unit):
            axis = "in_features" if gemm.role in row_parallel else "out_features"
            whole = f" x {unit}, so that no group of {unit} is cut" if unit > 1 else ""
            raise PlanError(
                f"{gemm.name} cannot be split over {world_size} processes: its {axis}, {size}, must be a multiple of "
                f"{world_size}{whole}"
            )


def share_scales_(model: nn.Module, group: Any) -> int:
    """Keep the scales that shards share equal in all processes of ``group``, from calibration on. Returns how many.

    Ranges are reduced by max when a quantizer is initialised, gradients by sum in every backward pass; all processes
    must run both on the same batches. LSQ's gradient factor 1 / sqrt(elements) counts the elements of a shard; the sum
    is divided by sqrt(processes), so that it is that of the whole matrix and does not depend on their number.

    Raises:
        PlanError: a shared quantizer has been calibrated already, each process alone.
    """
    shared = list(_shared_quantizers(model))
    done = [name for name, quantizer in shared if quantizer.active]
    if done:
        raise PlanError(f"{done[0]} is calibrated already: call share_scales_ after attach_ and before calibrate_")
    world_size = dist.get_world_size(group)
    for _, quantizer in shared:
        quantizer.reduce_amax = _MaxOver(group)
        quantizer.scale.register_hook(_SumOver(group, world_size**-0.5))
    return len(shared)


def equal_rates_(optimizer: torch.optim.Optimizer, model: nn.Module, group: Any) -> None:
    """Give every shared scale the same learning rate in all processes: the mean of their rates.

    To be called after ``give_scales_their_rate_``, which makes rates from the weights it sees, each process its own
    shard, and before a schedule is made.
    """
    shared = {id(quantizer.scale) for _, quantizer in _shared_quantizers(model)}
    for entry in optimizer.param_groups:
        if any(id(parameter) in shared for parameter in entry["params"]):
            rate = torch.tensor(float(entry["lr"]), dtype=torch.float64)
            dist.all_reduce(rate, group=group)
            entry["lr"] = float(rate) / dist.get_world_size(group)


def _problems(gemm: PlannedGemm, module: nn.Module, stages: Sequence[Stage]) -> Iterator[str]:
    split = split_of(module)
    where = f"{gemm.name} [{gemm.shape[0]}, {gemm.shape[1]}]"
    if getattr(module, "gradient_accumulation_fusion", False):
        yield f"{where} has gradient_accumulation_fusion on, which writes gradients past the mask: set it to False"
    if split is None:
        return
    if getattr(module, "sequence_parallel", False):
        yield f"{where} has sequence_parallel on, where processes hold different tokens: set it to False"
    if gemm.unstructured is not None:
        yield f"{where} is to have {gemm.sparsity} zeros, a threshold over the whole matrix: write an N:M sparsity"
    weight, inputs = gemm.weight, gemm.input
    if weight is not None and (weight["method"] not in _ROW_STATISTICS or weight.get("granularity") == "tensor"):
        yield f"{where}: the weight quantizer {weight['method']} takes statistics of the whole matrix: use lsq"
    if split == "rows":
        return
    group = _group(gemm)
    if gemm.shape[1] % group:
        yield (
            f"{where} is row-parallel and its shard of in_features, {gemm.shape[1]}, is no multiple of {group}, so the "
            f"split cuts groups of {gemm.sparsity}: use fewer processes or a smaller M"
        )
    for quantizer, what in ((weight, "weights"), (inputs, "inputs")):
        if quantizer is not None and quantizer["method"] != "lsq":
            yield f"{where} is row-parallel: {quantizer['method']} of its {what} would differ between shards: use lsq"
    if any(isinstance(stage, Prune) and stage.method == "sparsegpt" for stage in stages):
        yield f"{where} is row-parallel: SparseGPT spreads errors over all columns: use magnitude or wanda"
    if inputs is not None and any(isinstance(stage, Calibrate) and stage.percentile is not None for stage in stages):
        yield f"{where} is row-parallel: a percentile of its input needs all columns: leave `percentile` out"


def _group(gemm: PlannedGemm) -> int:
    return 1 if gemm.pattern is None else gemm.pattern.m


def _shared_quantizers(model: nn.Module) -> Iterator[tuple[str, LsqQuantizer]]:
    """The quantizers of row-parallel linears: each process sees some of the elements that one scale covers."""
    for name, module, parametrization in compressed_weights(model):
        if split_of(module) == "columns":
            for quantizer in (parametrization.quantizer, module._modules.get(INPUT_QUANTIZER)):
                if isinstance(quantizer, LsqQuantizer):
                    yield name, quantizer


class _OverGroup:
    """A reduction over a process group. Copies of a model share the group: it cannot be copied."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


class _MaxOver(_OverGroup):
    def __call__(self, amax: Tensor) -> Tensor:
        return self.reduce(amax, dist.ReduceOp.MAX)


class _SumOver(_OverGroup):
    def __init__(self, group: Any, correction: float) -> None:
        super().__init__(group)
        self.correction = correction

    @torch.no_grad()
    def __call__(self, gradient: Tensor) -> Tensor:
        return self.reduce(gradient, dist.ReduceOp.SUM).mul_(self.correction)
