"""The parameters of a decoder as engines divide them: by rows (FSDP2) or by elements (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dtrain.planning.shapes import LinearShape, ModelShape
from dtrain.planning.whole_modules import WholeModule
from dtrain.planning.workload import Workload

# A weight in NF4 takes 4 bits an element, one byte of scale for 64 elements, and one float32 for
# 256 scales (double quantization, arXiv:2305.14314). The scales are not parameters: engines do not
# shard them.
NF4_BYTES = 0.5
NF4_SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
FLOAT32 = 4


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the model.

    Attributes:
        trains: the optimizer updates it.
        kept: bytes of an element as a rank keeps it.
        computed: bytes of an element as it is gathered for computing.
    """

    rows: int
    columns: int
    trains: bool
    kept: int
    computed: int

    @property
    def elements(self) -> int:
        """Elements of the whole parameter."""
        return self.rows * self.columns

    def row_share(self, ranks: int) -> int:
        """Elements of a rank's rows; FSDP2 pads, so that every rank has as many rows."""
        return -(-self.rows // ranks) * self.columns

    def element_share(self, ranks: int) -> int:
        """Elements of a rank's range; ZeRO-3 pads, so that every rank has as many elements."""
        return -(-self.elements // ranks)


def padded_bytes(parameters: Sequence[ParameterSpec], ranks: int) -> float:
    """Bytes of gathered parameters whose rows are padded to a multiple of `ranks`."""
    return float(sum(x.computed * x.row_share(ranks) * ranks for x in parameters))


def reduced_bytes(parameters: Sequence[ParameterSpec], ranks: int) -> float:
    """Bytes of the gradients that FSDP2 reduces: float32, padded like the parameters."""
    rows = sum(x.row_share(ranks) for x in parameters if x.trains)
    return float(FLOAT32 * rows * ranks)


def layer_parameters(
    workload: Workload, train_bytes: int = FLOAT32, *, frozen: bool = False
) -> list[ParameterSpec]:
    """The parameters of one decoder layer, in the order of its modules; adapters follow a linear.

    Args:
        train_bytes: bytes of an element of what trains, as torch's engines keep it.
        frozen: of a layer whose own parameters do not train.
    """
    shape, parameters = workload.shape, list[ParameterSpec]()
    trains = workload.traits.trains_base and not frozen
    base = _base_parameter(workload, train_bytes, trains=trains)
    for linear in shape.linears:
        if workload.traits.quantizes_base and linear.packable:
            parameters.append(_packed(linear, workload))
        else:
            here = trains and bool(workload.layers_that_train(linear))
            weight = _base_parameter(workload, train_bytes, trains=here)
            rows, columns = linear.size
            parameters.append(replace(weight, rows=rows, columns=columns))
        if linear.bias:
            rows = linear.size[0]
            parameters.append(replace(base, rows=rows, columns=linear.biases // rows))
        parameters += _adapters(linear, workload, train_bytes)
    head_norms = shape.norm_elements - shape.norms * shape.hidden  # norms of queries and keys
    widths = [shape.hidden] * shape.norms + ([head_norms // 2] * 2 if head_norms else [])
    sizes = [*((width, 1) for width in widths), *shape.others]
    if shape.router[0]:
        here = trains and workload.method.trains_router
        router = _base_parameter(workload, train_bytes, trains=here)
        parameters.append(replace(router, rows=shape.router[0], columns=shape.router[1]))
    return parameters + [replace(base, rows=rows, columns=columns) for rows, columns in sizes]


def outer_parameters(workload: Workload, train_bytes: int = FLOAT32) -> list[ParameterSpec]:
    """The parameters outside the decoder layers: embeddings, final norm, untied output matrix."""
    shape = workload.shape
    parameters = []
    for name, (rows, columns) in shape.outer_sizes.items():
        trains = workload.method.trains_outer and not workload.method.freezes(name)
        base = _base_parameter(workload, train_bytes, trains=trains)
        parameters.append(replace(base, rows=rows, columns=columns))
    for linear in workload.adapted:
        if linear.name == "lm_head":
            parameters += _adapters(linear, workload, train_bytes)
    width = _trained_width(workload, train_bytes)
    return parameters + [ParameterSpec(*x, True, width, width) for x in workload.outer_shapes]


def layer_copies(
    workload: Workload, kind: ModelShape, train_bytes: int = FLOAT32
) -> list[ParameterSpec]:
    """The copies of modules that train whole, of one decoder layer of a kind."""
    block = replace(kind, layers=1)
    numbers = {number for number, x in enumerate(workload.shape.each_layer) if x == block}
    modules = (x for x in workload.whole_modules if numbers.intersection(x.layers))
    return _copies(modules, _trained_width(workload, train_bytes))


def outer_copies(workload: Workload, train_bytes: int = FLOAT32) -> list[ParameterSpec]:
    """The copies of modules that train whole, outside the decoder layers."""
    modules = (x for x in workload.whole_modules if not x.layers)
    return _copies(modules, _trained_width(workload, train_bytes))


def _copies(modules: Iterable[WholeModule], width: int) -> list[ParameterSpec]:
    return [ParameterSpec(*size, True, width, width) for x in modules for size in x.parameters]


def _trained_width(workload: Workload, train_bytes: int) -> int:
    """Bytes of an element of what is added; DeepSpeed keeps it in the compute dtype."""
    return workload.element_bytes if workload.capabilities.is_deepspeed else train_bytes


def _base_parameter(workload: Workload, train_bytes: int, *, trains: bool) -> ParameterSpec:
    """A parameter of the base without its size; DeepSpeed keeps all in the compute dtype."""
    e = workload.element_bytes
    kept = train_bytes if trains and not workload.capabilities.is_deepspeed else e
    return ParameterSpec(0, 0, trains, kept, e)


def _packed(linear: LinearShape, workload: Workload) -> ParameterSpec:
    """A weight in NF4, which bitsandbytes stores as one column of the compute dtype."""
    e = workload.element_bytes
    elements = int(NF4_BYTES * linear.elements) // e
    if linear.experts > 1:
        return ParameterSpec(linear.experts, elements // linear.experts, False, e, e)
    return ParameterSpec(elements, 1, False, e, e)


def _adapters(linear: LinearShape, workload: Workload, train_bytes: int) -> Iterator[ParameterSpec]:
    if linear not in workload.adapted:
        return
    width = _trained_width(workload, train_bytes)
    for rows, columns in workload.adapter_shapes(linear):
        yield ParameterSpec(rows, columns, True, width, width)
        if workload.traits.counts_from_start:
            yield ParameterSpec(rows, columns, False, width, width)
