"""Counts the memory of a simulated step: the peaks, and what the memory was used for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COMMUNICATION = ("fsdp", "c10d", "_c10d_functional")  # namespaces of gathers and reductions
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
GATHERED, ACTIVATIONS, WORKING = "gathered", "activations", "working"
OUTLIVES = {"forward": ACTIVATIONS, "backward": GRADIENTS, "update": OPTIMIZER}


class PeakSnapshot:
    """The most memory that was in use in one phase and region.

    Attributes:
        total: bytes.
        sizes: bytes of each living storage, by its number in the ledger.
        module: name of the module that was computing.
    """

    def __init__(self, total: int, sizes: dict[int, int], module: str) -> None:
        self.total, self.sizes, self.module = total, sizes, module


class MemoryLedger(TorchDispatchMode):
    """Sums the sizes of living storages while it is active.

    The use of a storage is known only later: what outlives the forward pass was saved for the
    backward pass. So a peak records its storages by number, and they get their names in the end.

    Attributes:
        phase: forward, backward or update.
        location: returns the region of the model and the name of the module that computes.
    """

    def __init__(self, location: Callable[[], tuple[str, str]]) -> None:
        super().__init__()
        self.phase, self.location = "", location
        self.peaks: dict[tuple[str, str], PeakSnapshot] = {}
        self.total = 0
        self._living: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # address of a living storage → its number
        self._names: dict[int, str] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return fake_value(args[0])
        result = func(*args, **(kwargs or {}))
        if func.namespace in COMMUNICATION:
            self.record(tree_leaves((result, args, kwargs)), GATHERED)
        else:
            self.record(tree_leaves(result))
        return result

    def record(self, tensors: Iterable[Any], name: str = "") -> None:
        """Count the storages of fake tensors until they are freed; `name` those without a name."""
        for tensor in tensors:
            number = self._number(tensor)
            if number is not None and name:
                self._names.setdefault(number, name)

    def name(self, tensors: Iterable[Any], name: str) -> None:
        """Name the storages of tensors by their use."""
        for tensor in tensors:
            number = self._number(tensor)
            if number is not None:
                self._names[number] = name

    def name_rest(self, name: str) -> None:
        """Name all living storages that have no name yet."""
        for number in self._living:
            self._names.setdefault(number, name)

    def _number(self, tensor: Any) -> int | None:
        tensor = getattr(tensor, "_local_tensor", tensor)
        if not isinstance(tensor, FakeTensor):
            return None
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._numbers:
            self._next += 1
            self._numbers[address] = self._next
            weakref.finalize(storage, self._forget, address)
        number = self._numbers[address]
        if size != self._living.get(number, 0):
            self._grow(number, size)
        return number

    def _grow(self, number: int, size: int) -> None:
        self.total += size - self._living.get(number, 0)
        self._living[number] = size
        if not self.phase:
            return
        region, module = self.location()
        best = self.peaks.get((self.phase, region))
        if best is None or self.total > best.total:
            self.peaks[self.phase, region] = PeakSnapshot(self.total, dict(self._living), module)

    def _forget(self, address: int) -> None:
        self.total -= self._living.pop(self._numbers.pop(address), 0)

    def record_resize(self, storage: torch.UntypedStorage) -> None:
        """Record a resize, by which FSDP2 frees gathered weights without an operation."""
        number = self._numbers.get(storage._cdata)
        if number is not None:
            self._names.setdefault(number, GATHERED)
            self._grow(number, storage.nbytes())

    def end_phase(self) -> None:
        """End the phase; unnamed storages that outlive it are what the phase computes to keep."""
        self.name_rest(OUTLIVES[self.phase])
        self.phase = ""

    def forget_peaks(self) -> None:
        """Drop the peaks of the warm-up step."""
        self.peaks.clear()

    def terms(self, peak: PeakSnapshot) -> dict[str, int]:
        """Bytes by name at a peak."""
        terms: Counter[str] = Counter()
        for number, size in peak.sizes.items():
            terms[self._names.get(number, WORKING)] += size
        return dict(terms)


def watch_resizes(on_resize: Callable[[torch.UntypedStorage], None]) -> None:
    """Call `on_resize` for every storage that this process resizes from now on."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = original(storage, size)
        on_resize(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]


def fake_value(tensor: Tensor) -> bool | int | float:
    """The value of a fake scalar: 1, so that no division fails and every value is finite."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1
