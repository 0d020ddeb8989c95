"""Where feature maps are taken in a model, which of the teacher's goes with which of the student's, and the taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..models.adapter import Sites
from .heads import DistillError

Part = Literal["attn_out", "cross_out", "block_out"]


@dataclass(frozen=True)
class Point:
    """One place of a model where a feature map [B, L, width] can be taken.

    Args:
        block: 1-based; of encoder-decoders the decoder's blocks are counted after the encoder's.
        part: ``attn_out`` and ``cross_out``: output of the attention's last projection, before the residual;
            ``block_out``: output of the block.
        side: ``block``, ``encoder`` or ``decoder``.
    """

    block: int
    part: Part
    side: str
    width: int

    def __str__(self) -> str:
        return f"{self.part} of block {self.block}"


def points_of(sites: Sites, features: Sequence[str]) -> tuple[Point, ...]:
    """Every point of a model, by block. ``attn_out`` among the features stands for the cross attention's output too."""
    wanted = {*features, "cross_out"} if "attn_out" in features else set(features)
    found = []
    for block in sites.blocks:
        outputs = {gemm.role: gemm for gemm in sites.gemms if gemm.block == block.index}
        for part in ("attn_out", "cross_out", "block_out"):
            # A block gives what its attention adds to the residual stream: the same width.
            gemm = outputs.get("attn_out" if part == "block_out" else part)
            if part in wanted and gemm is not None:
                found.append(Point(block.index + 1, part, block.kind, gemm.out_features))
    return tuple(found)


def skip_blocks(teacher: int, student: int, last: bool = False) -> tuple[int, ...]:
    """PKD-skip: every (teacher / student)-th block, 1-based; ``last`` keeps the last, else the output loss covers it.

    12 blocks to 6: (2, 4, 6, 8, 10) (Sun et al. 2019, section 3.2).

    Raises:
        DistillError: the student's number of blocks does not divide the teacher's.
    """
    if student < 1 or teacher % student:
        raise DistillError(
            f"`skip` takes every (teacher / student)-th block, and {student} student blocks do not divide {teacher} "
            "teacher blocks: list the teacher's blocks (blocks: [2, 5, ...])"
        )
    step = teacher // student
    return tuple(step * block for block in range(1, student + last))


def pair_points(
    student: Sequence[Point], teacher: Sequence[Point], blocks: str | Sequence[int]
) -> list[tuple[Point, Point]]:
    """Which point of the teacher each point of the student is compared with.

    Args:
        blocks: ``all``: block by block, for equal depths. ``skip``: `skip_blocks`, on each side; of encoder-decoders
            only the decoder's last is left out. Numbers: teacher blocks for the student's blocks 1, 2, ...

    Raises:
        DistillError: depths or sides that differ, or a number that is no block of the teacher's.
    """
    of_teacher = _by_block(teacher)
    mapping = _mapping(student, teacher, blocks)
    pairs = []
    for point in student:
        if point.block in mapping:
            partner = of_teacher[mapping[point.block]].get(point.part)
            if partner is not None:
                pairs.append((point, partner))
    return pairs


def _mapping(student: Sequence[Point], teacher: Sequence[Point], blocks: str | Sequence[int]) -> dict[int, int]:
    """Student block to teacher block."""
    ours, theirs = _sides(student), _sides(teacher)
    if not isinstance(blocks, str):
        numbers = sorted(number for of in ours.values() for number in of)
        known = [number for of in theirs.values() for number in of]
        if wrong := [number for number in blocks if number not in known]:
            raise DistillError(f"blocks: {wrong[0]} is none of the teacher's blocks 1 to {max(known, default=0)}")
        if len(blocks) > len(numbers):
            raise DistillError(f"blocks: {len(blocks)} teacher blocks for a student of {len(numbers)}: list fewer")
        return dict(zip(numbers, blocks, strict=False))
    if list(ours) != list(theirs):
        raise DistillError(
            f"the teacher has blocks of kind {', '.join(theirs) or 'none'}, the student {', '.join(ours) or 'none'}: "
            "list the teacher's blocks (blocks: [1, 2, ...])"
        )
    mapping: dict[int, int] = {}
    for side, numbers in ours.items():
        if blocks == "skip":
            chosen = skip_blocks(len(theirs[side]), len(numbers), last=side != list(ours)[-1])
            mapping |= {own: theirs[side][number - 1] for own, number in zip(numbers, chosen, strict=False)}
        elif len(numbers) == len(theirs[side]):
            mapping |= dict(zip(numbers, theirs[side], strict=True))
        else:
            raise DistillError(
                f"the teacher has {len(theirs[side])} blocks, the student {len(numbers)}: list the teacher's blocks to "
                "compare with the student's blocks 1, 2, ... (blocks: [2, 4, ...]), or set feature: 0"
            )
    return mapping


def check_widths(pairs: Sequence[tuple[Point, Point]], instead: str) -> None:
    """Raises:
    DistillError: feature maps of different widths; ``instead`` says what to write.
    """
    for ours, theirs in pairs:
        if ours.width != theirs.width:
            raise DistillError(
                f"feature maps differ in width: {theirs} of the teacher has {theirs.width}, {ours} of the student "
                f"{ours.width}; {instead}"
            )


class FeatureTap:
    """Collects feature maps of one model during a forward pass: a context manager around it.

    ``features`` then holds one map per point, in the order of the points. It holds None for a block that the model left
    out at this step, as LayerDrop does while training.
    """

    def __init__(self, sites: Sites, points: Sequence[Point]) -> None:
        self.points = tuple(points)
        self._blocks = {block.index + 1: block.module for block in sites.blocks}
        gemms = {(gemm.block + 1, gemm.role): gemm.module for gemm in sites.gemms if gemm.block is not None}
        self._modules: list[nn.Module] = [
            self._blocks[point.block] if point.part == "block_out" else gemms[point.block, point.part]
            for point in self.points
        ]
        self._seen: dict[nn.Module, Tensor | None] = {}
        self._hooks: list[Any] = []

    def _record(self, module: nn.Module, args: object, output: object) -> None:
        self._seen[module] = _tensor(output)

    def __enter__(self) -> FeatureTap:
        self._seen = {}
        watched = [*self._modules, *(self._blocks[point.block] for point in self.points)]
        self._hooks = [module.register_forward_hook(self._record) for module in dict.fromkeys(watched)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def features(self) -> list[Tensor | None]:
        """The maps of the last pass.

        Raises:
            DistillError: a module whose output the model did not compute by calling it, or that gives no tensor.
        """
        found: list[Tensor | None] = []
        for point, module in zip(self.points, self._modules, strict=True):
            block = self._blocks[point.block]
            output = self._seen.get(module)
            if output is None and (block in self._seen or not block.training):
                raise DistillError(
                    f"the model did not call the module that gives {point} ({type(module).__name__}), or it gives no "
                    "tensor: leave it out of `features`"
                )
            found.append(output)
        return found


def _tensor(output: object) -> Tensor | None:
    """The first tensor of what a module returns: itself, or the first of a tuple or of a transformers ModelOutput."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, Sequence) and values and isinstance(values[0], Tensor):
        return values[0]
    return None


def _by_block(points: Sequence[Point]) -> dict[int, dict[str, Point]]:
    found: dict[int, dict[str, Point]] = {}
    for point in points:
        found.setdefault(point.block, {})[point.part] = point
    return found


def _sides(points: Sequence[Point]) -> dict[str, list[int]]:
    """Block numbers of each side, encoder first."""
    sides: dict[str, list[int]] = {}
    for number, side in sorted({(point.block, point.side) for point in points}):
        sides.setdefault(side, []).append(number)
    return sides
