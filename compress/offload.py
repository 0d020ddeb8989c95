"""Weights that wait in a file while they are not used, so that pruning holds those of one group of GEMMs in memory.

A weight comes back by itself whenever its parametrization is asked for it; until then a stand-in of its shape, full of
NaN and without memory of its own, takes its place.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .attached import CompressedWeight, latent
from .lockstep import give_back_memory


class Offload:
    """A context manager: inside, latent weights of attached GEMMs wait in a temporary file; afterwards all are back.

    Only weights that are floating point, on the CPU, contiguous and shared with nothing else are moved; others stay.

    Args:
        model: the whole of it, to know what is shared. gemms: name -> attached module and its parametrization.
        folder: where the file is made, for as long as it is open; it holds as many bytes as the weights. None moves
            nothing.

    Raises:
        OSError: no room; every weight is in memory again.
    """

    def __init__(
        self,
        model: nn.Module,
        gemms: Mapping[str, tuple[nn.Module, CompressedWeight]],
        folder: str | os.PathLike[str] | None,
    ) -> None:
        self._folder = folder
        self._hooked = [] if folder is None else [weight for _, weight in gemms.values()]
        movable = {} if folder is None else {name: latent(module) for name, (module, _) in gemms.items()}
        owners = Counter(_address(tensor) for tensor in _all_tensors(model))
        self._weights = {name: w for name, w in movable.items() if owners[_address(w)] == 1 and _is_plain(w)}
        self._places: dict[str, int] = {}
        self._names = {id(weight): name for name, weight in self._weights.items()}
        self._away: set[str] = set()
        self._handles: list[Any] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> Offload:
        if not self._weights:
            return self
        self._file = tempfile.TemporaryFile(dir=self._folder)
        try:
            self._handles = [weight.register_forward_pre_hook(self._bring_back) for weight in self._hooked]
            self.keep_only(())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        give_back_memory()  # of the passes, before all weights come back
        for handle in self._handles:
            handle.remove()
        try:
            self._load_(self._weights)
        finally:
            if self._file is not None:
                self._file.close()

    def keep_only(self, names: Collection[str]) -> None:
        """Weights of ``names`` are in memory afterwards, all others in the file."""
        for name in self._weights.keys() - self._away - set(names):
            if name not in self._places:
                self.write([name])
            weight = self._weights[name]
            weight.data = weight.new_full((1,), torch.nan).expand(weight.shape)
            self._away.add(name)
        self._load_(names)

    def write(self, names: Iterable[str]) -> None:
        """Weights that are in memory and have changed: into the file."""
        for name in names:
            if name in self._weights and self._file is not None:
                self._places.setdefault(name, sum(self._weights[held].nbytes for held in self._places))
                self._file.seek(self._places[name])
                self._file.write(_bytes(self._weights[name]))

    def _load_(self, names: Iterable[str]) -> None:
        for name in self._away.intersection(names):
            assert self._file is not None
            weight = self._weights[name]
            found = torch.empty(weight.shape, dtype=weight.dtype)
            self._file.seek(self._places[name])
            if self._file.readinto(_bytes(found)) != found.nbytes:  # type: ignore[attr-defined]
                raise OSError(f"the temporary file of weights ended before the weight of {name}")
            weight.data = found
            self._away.remove(name)

    def _bring_back(self, _: nn.Module, args: tuple[Tensor]) -> None:
        name = self._names.get(id(args[0]))
        if name in self._away:
            self._load_([name])


def _all_tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from (tensor for _, tensor in model.named_parameters(remove_duplicate=False))
    yield from (tensor for _, tensor in model.named_buffers(remove_duplicate=False))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_plain(weight: Tensor) -> bool:
    """Nothing but this tensor would lose its memory, and the memory can be freed: no file mapping."""
    storage = weight.untyped_storage()
    alone = weight.is_contiguous() and storage.nbytes() == weight.nbytes and storage.resizable()
    return alone and weight.device.type == "cpu" and weight.is_floating_point()


def _bytes(weight: Tensor) -> Any:
    return weight.detach().reshape(-1).view(torch.uint8).numpy()
