"""The tensors of a decoder as engines divide them: FSDP2 by whole rows, ZeRO-3 by elements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dtrain.planning.shapes import LinearShape
from dtrain.planning.workload import ZERO, Workload

# Of a linear layer held in NF4: 4 bits an element; for 64 elements one byte of scale; for 256 of
# those a float32 of the second quantisation. The scales are no parameters: no engine shards them.
NF4_BYTES = 0.5
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor.

    Attributes:
        kept, computed: bytes of an element where a rank keeps it, and where it computes.
    """

    rows: int
    columns: int
    trains: bool
    kept: int
    computed: int

    @property
    def elements(self) -> int:
        """Of the whole tensor."""
        return self.rows * self.columns

    def row_share(self, ranks: int) -> int:
        """Elements of a rank's rows; FSDP2 pads, so that every rank has as many."""
        return -(-self.rows // ranks) * self.columns

    def share(self, ranks: int) -> int:
        """Elements of a rank's range; ZeRO-3 pads, so that every rank has as many."""
        return -(-self.elements // ranks)


def padded_bytes(parameters: Sequence[ParameterSpec], ranks: int) -> float:
    """Of parameters as they compute, with as many rows of each for every one of `ranks`."""
    return float(sum(one.computed * one.row_share(ranks) * ranks for one in parameters))


def sent_bytes(parameters: Sequence[ParameterSpec], ranks: int) -> float:
    """Of the gradients of what trains as FSDP2 reduces them, in float32 and padded."""
    rows = sum(one.row_share(ranks) for one in parameters if one.trains)
    return float(FLOAT32 * rows * ranks)


def layer_parameters(workload: Workload, train_bytes: int = FLOAT32) -> list[ParameterSpec]:
    """Of one decoder layer, adapters beside what they adapt.

    Args:
        train_bytes: of an element of what trains, where torch's engines keep it.
    """
    shape, found = workload.shape, list[ParameterSpec]()
    base = _base(workload, train_bytes)
    for linear in shape.linears:
        found.append(
            _packed(linear, workload) if workload.method == "qlora" else _matrix(linear, base)
        )
        if linear.bias:
            found.append(_like(base, linear.outputs, 1))
        found += _adapters(linear, workload, train_bytes)
    heads = shape.norm_elements - shape.norms * shape.hidden  # norms of queries and keys
    norms = [shape.hidden] * shape.norms + ([heads // 2] * 2 if heads else [])
    return found + [_like(base, width, 1) for width in norms]


def outer_parameters(workload: Workload, train_bytes: int = FLOAT32) -> list[ParameterSpec]:
    """Outside the decoder layers: embeddings, last norm, output matrix where it is its own."""
    shape, base = workload.shape, _base(workload, train_bytes)
    found = [_like(base, shape.vocabulary, shape.hidden), _like(base, shape.hidden, 1)]
    if not shape.tied:
        found.append(found[0])
    for linear in workload.adapted:
        if linear.name == "lm_head":
            found += _adapters(linear, workload, train_bytes)
    return found


def _base(workload: Workload, train_bytes: int) -> ParameterSpec:
    """What a tensor of the base is like; DeepSpeed keeps all in the dtype that computes."""
    e = workload.element_bytes
    kept = train_bytes if workload.is_full and workload.engine not in ZERO else e
    return ParameterSpec(0, 0, workload.is_full, kept, e)


def _like(one: ParameterSpec, rows: int, columns: int) -> ParameterSpec:
    return ParameterSpec(rows, columns, one.trains, one.kept, one.computed)


def _matrix(linear: LinearShape, base: ParameterSpec) -> ParameterSpec:
    return _like(base, linear.outputs, linear.inputs)


def _packed(linear: LinearShape, workload: Workload) -> ParameterSpec:
    """bitsandbytes keeps a packed weight as a column of the dtype that computes."""
    e = workload.element_bytes
    return ParameterSpec(int(NF4_BYTES * linear.elements) // e, 1, False, e, e)


def _adapters(linear: LinearShape, workload: Workload, train_bytes: int) -> Iterator[ParameterSpec]:
    if linear in workload.adapted:
        width = workload.element_bytes if workload.engine in ZERO else train_bytes
        yield ParameterSpec(workload.rank, linear.inputs, True, width, width)
        yield ParameterSpec(linear.outputs, workload.rank, True, width, width)
