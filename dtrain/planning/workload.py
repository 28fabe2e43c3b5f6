"""One stage on one cluster, as the numbers that memory, time and communication depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, prod
from statistics import fmean

from dtrain.config import deepspeed_file
from dtrain.config.engines import ENGINES, EngineCapabilities
from dtrain.config.methods import MethodSettings, MethodTraits
from dtrain.config.methods.base import Shapes
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.planning.gpus import Gpu
from dtrain.planning.shapes import (
    LinearShape,
    ModelShape,
    layer_names,
    matching_linears,
    select_linears,
)
from dtrain.planning.whole_modules import WholeModule, select_modules

BUCKET_ELEMENTS = 100_000_000
"""`reduce_bucket_size` of ds_configs/*.json; a test compares this value and the next two."""
LIVE_ELEMENTS = 1_000_000_000
"""`stage3_max_live_parameters` and `stage3_max_reuse_distance` there."""
PERSISTENT_ELEMENTS = 100_000
"""`stage3_param_persistence_threshold` there."""


@dataclass(frozen=True)
class Cluster:
    """Nodes that all have the same number of the same GPUs."""

    gpu: Gpu
    nodes: int = 1
    gpus_per_node: int = 8

    @property
    def ranks(self) -> int:
        """Ranks of a run on the whole cluster."""
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus_per_node} {self.gpu.name}"


@dataclass(frozen=True)
class Workload:
    """A stage as it would run.

    Attributes:
        method: the method's settings.
        engine: kind of the engine, a key of `dtrain.config.engines.ENGINES`.
        ranks: ranks of the run.
        node_ranks: ranks on one node.
        shard: ranks that share one copy of the base model.
        element_bytes: bytes of an element of the compute dtype, 2 or 4.
        micro_batch: sequences that a rank computes at once.
        accumulation: micro-batches in an optimizer step.
        bucket_elements, live_elements, reuse_elements, prefetch_elements, persistent_elements:
            limits from DeepSpeed's file, in elements.
        on_gpu: on a GPU, torch's optimizer updates all parameters at once, with a copy of one
            state; on a CPU, gloo copies what it reduces and scatters.
        kernels: dtrain's own layers that are used in this model.
        trains_on_all_tokens: every token is a target; otherwise only answers are, and there may be
            few rows of logits.
        extra_forwards: forward passes of each token without a backward pass, such as those of a
            reference model; less than 1 if they compute some of the tokens.
        extra_runs: number of such passes of a micro-batch, each of which gathers the weights.
        distills: the loss compares the probabilities of all tokens with another model's.
        kept_values: float32 values kept of each parameter that trains, by the method or by a term
            against forgetting.
        teacher: shape of the teacher, if that is another model.
        stores_teacher: what the teacher says is stored before the training, and it is released.
        uses_autocast: computes under autocast where the trained parameters are wider than the
            compute dtype, as dtrain always does.
        new_tokens: tokens that the recipe adds to the base.
    """

    shape: ModelShape
    method: MethodSettings = field(hash=False)  # it may have a list
    engine: str
    ranks: int
    node_ranks: int
    shard: int
    element_bytes: int
    sequence_length: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    optimizer: str = "adamw"
    offload: bool = False
    bucket_elements: int = BUCKET_ELEMENTS
    live_elements: int = LIVE_ELEMENTS
    reuse_elements: int = LIVE_ELEMENTS
    prefetch_elements: int = deepspeed_file.MAX_PREFETCHED
    persistent_elements: int = PERSISTENT_ELEMENTS
    on_gpu: bool = True
    kernels: frozenset[str] = frozenset()
    trains_on_all_tokens: bool = True
    extra_forwards: float = 0
    extra_runs: int = 0
    distills: bool = False
    kept_values: int = 0
    teacher: ModelShape | None = None
    stores_teacher: bool = False
    uses_autocast: bool = True
    new_tokens: int = 0

    @property
    def traits(self) -> MethodTraits:
        """What the method does to memory."""
        return self.method.traits

    @property
    def capabilities(self) -> EngineCapabilities:
        """What the engine can do, and what each rank stores under it."""
        return ENGINES[self.engine]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, with the virtual ones of one document a sequence."""
        return self.micro_batch * (self.sequence_length + self.method.added_tokens)

    @property
    def step_tokens(self) -> int:
        """Tokens of an optimizer step, over all ranks."""
        return self.micro_batch * self.sequence_length * self.accumulation * self.ranks

    @property
    def autocasts(self) -> bool:
        """Whether torch's autocast casts to 16 bits; DeepSpeed casts the model itself."""
        return self.uses_autocast and self.element_bytes == 2 and not self.capabilities.is_deepspeed

    @property
    def adapted(self) -> tuple[LinearShape, ...]:
        """Linear layers of a decoder layer that get an adapter."""
        return _adapted(matching_linears, self.shape, self.method)

    @cached_property
    def kinds(self) -> tuple[Workload, ...]:
        """This workload on the decoder layers of each kind alone."""
        return tuple(replace(self, shape=kind) for kind in self.shape.kinds)

    def adapter_saved(self, linear: LinearShape) -> float:
        """Elements a token that the adapter of a layer saves; the mean where layers differ."""
        adapter, sizes = self.method.adapter, (linear.outputs, linear.inputs)
        assert adapter
        names = layer_names(self.shape, linear)
        return linear.active * fmean(adapter.saved_elements(name, *sizes) for name in names)

    def adapter_shapes(self, linear: LinearShape) -> Shapes:
        """Rows and columns of the matrices that the method adds to one of `adapted`.

        Memory counts all decoder layers as alike: where they differ, these are means, rounded up.
        """
        matrices = zip(*self._shapes_by_layer[linear], strict=True)
        return tuple(
            (ceil(fmean(rows for rows, _ in matrix)), ceil(fmean(columns for _, columns in matrix)))
            for matrix in matrices
        )

    @cached_property
    def _shapes_by_layer(self) -> dict[LinearShape, list[Shapes]]:
        """Each of `adapted` → the shapes of its adapters in the decoder layers."""
        adapter = self.method.adapter
        return {
            x: [
                _of_experts(adapter.shapes(name, x.outputs, x.inputs), x.experts)
                for name in layer_names(self.shape, x)
            ]
            for x in self.adapted
            if adapter
        }

    @cached_property
    def whole_modules(self) -> tuple[WholeModule, ...]:
        """The modules of the base whose copies train together with an adapter."""
        adapter, shape = self.method.adapter, self.shape
        if adapter is None:
            return ()
        modules = select_modules(shape, adapter.whole_modules, trains_router=adapter.trains_router)
        if not (adapter.trains_router and shape.experts):
            return modules
        mixtures = (n for n, block in enumerate(shape.each_layer) if block.router[0])
        routers = WholeModule("router", tuple(mixtures), (shape.router,))
        return (*modules, routers)

    @property
    def trains_matrices(self) -> bool:
        """Whether embeddings or output matrix train, whole."""
        matrix = (self.shape.vocabulary, self.shape.hidden)
        outer = (module for module in self.whole_modules if not module.layers)
        return self.method.trains_outer or any(matrix in module.parameters for module in outer)

    @property
    def outer_shapes(self) -> Shapes:
        """Rows and columns of what the method adds outside the decoder layers."""
        added = self.method.outer_shapes(self.shape.hidden, self.shape.layers, self.shape.kv)
        rows = ((self.token_rows, self.shape.hidden),) if self.token_rows else ()
        return (*added, *rows * (1 if self.shape.tied else 2))

    @property
    def token_rows(self) -> int:
        """Rows of new tokens that train alone, in each of the two matrices."""
        alone = self.method.trains_token_rows and not self.trains_matrices
        return self.new_tokens if alone else 0

    @property
    def adapter_products(self) -> int:
        """Elements of all matrices of adapters that a token is multiplied with."""
        adapter = self.method.adapter
        return sum(
            x.active * adapter.multiplied_elements(name, x.outputs, x.inputs)
            for x in self.adapted
            for name in layer_names(self.shape, x)
            if adapter
        )

    @property
    def trained_layers(self) -> int:
        """Decoder layers, the last ones, whose own parameters train."""
        return self.method.trained_layers(self.shape.layers)

    @property
    def trained_share(self) -> float:
        """Share of the decoder layers whose own parameters train."""
        return self.trained_layers / self.shape.layers

    @property
    def backward_share(self) -> float:
        """Share of the decoder layers that the backward pass reaches: to the lowest that trains."""
        return 1.0 if self.traits.adds_adapter else self.trained_share

    @property
    def supports_optimizer(self) -> bool:
        """Whether the engine supports the optimizer."""
        needs_whole = OPTIMIZERS[self.optimizer].whole_parameters
        return self.capabilities.whole_parameters or not needs_whole

    @property
    def optimizer_state_bytes(self) -> float:
        """The optimizer's state of all parameters that train."""
        traits = OPTIMIZERS[self.optimizer]
        total = traits.state_bytes * self.trainable
        if traits.layer_matrix_bytes is not None:
            saved = traits.state_bytes - traits.layer_matrix_bytes
            total -= saved * self.trained_linear_elements
        return total

    @cached_property
    def trainable(self) -> int:
        """Number of parameters that train."""
        adapters = sum(
            prod(matrix)
            for layers in self._shapes_by_layer.values()
            for shapes in layers
            for matrix in shapes
        )
        whole = sum(
            max(len(module.layers), 1) * prod(matrix)
            for module in self.whole_modules
            for matrix in module.parameters
        )
        added = sum(prod(matrix) for matrix in self.outer_shapes)
        return adapters + added + whole + self._trained_base

    @property
    def _trained_base(self) -> int:
        """The base's own parameters that train.

        Of those in decoder layers, all but the linear layers' weights count as training.
        """
        method, shape = self.method, self.shape
        outer = shape.outer_elements if method.trains_outer else {}
        matrices = sum(n for name, n in outer.items() if not method.freezes(name))
        first = shape.layers - self.trained_layers
        vectors = sum(
            block.norm_elements
            + sum(prod(size) for size in block.others)
            + sum(x.biases for x in block.linears)
            + prod(block.router) * method.trains_router
            for block in shape.each_layer[first:]
        )
        return matrices + vectors + self.trained_linear_elements

    @cached_property
    def trained_linear_elements(self) -> int:
        """Weights of the base's linear layers that train."""
        return sum(x.elements * len(self.layers_that_train(x)) for x in self.shape.linears)

    @cached_property
    def trained_active_elements(self) -> int:
        """Those of them that a token is multiplied with."""
        linears = self.shape.linears
        return sum(x.active_elements * len(self.layers_that_train(x)) for x in linears)

    def layers_that_train(self, linear: LinearShape) -> list[str]:
        """Names of a linear layer in those decoder layers in which its own weight trains."""
        first = self.shape.layers - self.trained_layers
        numbers = linear.layers or range(self.shape.layers)
        names = zip(numbers, layer_names(self.shape, linear), strict=True)
        return [
            name
            for number, name in names
            if number >= first and not self.method.freezes(f"{name}.weight")
        ]


def adapted_linears(shape: ModelShape, method: MethodSettings) -> tuple[LinearShape, ...]:
    """The linear layers of a decoder layer that get an adapter.

    Raises:
        UserError: no linear layer has one of the names.
    """
    return _adapted(select_linears, shape, method)


def _adapted(
    select: Callable[..., tuple[LinearShape, ...]], shape: ModelShape, method: MethodSettings
) -> tuple[LinearShape, ...]:
    adapter = method.adapter
    if adapter is None:
        return ()
    return select(shape, adapter.target_modules, experts=adapter.adapts_experts)


def _of_experts(shapes: Shapes, experts: int) -> Shapes:
    """The shapes of A [E r, in] and B [out, r E] of all experts from those of one."""
    if experts == 1:
        return shapes
    (r, inputs), (outputs, _) = shapes
    return (experts * r, inputs), (outputs, experts * r)
