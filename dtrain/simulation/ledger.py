"""What lives at each moment of a simulated step, what it is, and when it was most."""

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

SENDING = ("fsdp", "c10d", "_c10d_functional")  # operations that gather, reduce and copy for it
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
GATHERED, ACTIVATIONS, WORKING = "gathered", "activations", "working"
KEPT_OF = {"forward": ACTIVATIONS, "backward": GRADIENTS, "update": OPTIMIZER}


class Peak:
    """The most that lived in one kind of place.

    Attributes:
        sizes: bytes of what lived then, by its number in the ledger.
        module: that computed.
    """

    def __init__(self, total: int, sizes: dict[int, int], module: str) -> None:
        self.total, self.sizes, self.module = total, sizes, module


class Ledger(TorchDispatchMode):
    """Sums the storages that live while it is on.

    What a storage is becomes plain only later (what outlives the forward pass was kept for the
    backward pass), so a peak remembers its storages by number, and they are named in the end.

    Attributes:
        phase: forward, backward or update.
        place: says where in the model we are: a kind of place, and the module's name.
    """

    def __init__(self, place: Callable[[], tuple[str, str]]) -> None:
        super().__init__()
        self.phase, self.place = "", place
        self.peaks: dict[tuple[str, str], Peak] = {}
        self.total = 0
        self._living: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # of a living storage, by its address
        self._names: dict[int, str] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return one(args[0])
        result = func(*args, **(kwargs or {}))
        if func.namespace in SENDING:
            self.see(tree_leaves((result, args, kwargs)), GATHERED)
        else:
            self.see(tree_leaves(result))
        return result

    def see(self, tensors: Iterable[Any], name: str = "") -> None:
        """Count the storages behind fake tensors until they die; `name` those without a name."""
        for tensor in tensors:
            number = self._number(tensor)
            if number is not None and name:
                self._names.setdefault(number, name)

    def name(self, tensors: Iterable[Any], name: str) -> None:
        """Say what storages are."""
        for tensor in tensors:
            number = self._number(tensor)
            if number is not None:
                self._names[number] = name

    def name_rest(self, name: str) -> None:
        """Say what all that lives and has no name yet is."""
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
        kind, module = self.place()
        best = self.peaks.get((self.phase, kind))
        if best is None or self.total > best.total:
            self.peaks[self.phase, kind] = Peak(self.total, dict(self._living), module)

    def _forget(self, address: int) -> None:
        self.total -= self._living.pop(self._numbers.pop(address), 0)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees what it gathered by resizing its storage, which is no operation."""
        number = self._numbers.get(storage._cdata)
        if number is not None:
            self._names.setdefault(number, GATHERED)
            self._grow(number, storage.nbytes())

    def end_phase(self) -> None:
        """What lives on from a phase is what the phase makes to keep."""
        self.name_rest(KEPT_OF[self.phase])
        self.phase = ""

    def forget_peaks(self) -> None:
        """Begin anew: what was before was warming up."""
        self.peaks.clear()

    def terms(self, peak: Peak) -> dict[str, int]:
        """Name → bytes of what lived at a peak."""
        found: Counter[str] = Counter()
        for number, size in peak.sizes.items():
            found[self._names.get(number, WORKING)] += size
        return dict(found)


def hear_resizes(told: Callable[[torch.UntypedStorage], None]) -> None:
    """Tell of every storage that is resized from now on; for a process that only counts."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = original(storage, size)
        told(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment,method-assign]


def one(tensor: Tensor) -> bool | int | float:
    """What a fake number is said to be: 1, so that nothing divides by zero or is not finite."""
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1
