"""What a forward pass keeps for the backward pass, as dtrain computes it.

Letters: T tokens of a micro-batch, K of them supervised, h hidden size, q and kv width of queries
and of keys, f width of the MLP, V vocabulary, e bytes of an element that computes (2 or 4).

The terms are what autograd saves in transformers' decoder layers with attention per document
(dtrain/models/attention.py), logits of supervised tokens only (dtrain/models/loss.py), PEFT's
LoRA layers and keyed dropout (dtrain/models/dropout.py). Measured layer by layer on a CPU they are
exact to 0.5 % (tests/distributed/test_plan_real.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.kernel_sizes import LAYERS, LOSS, MLPS, NORMS, chunk_rows
from dtrain.planning.workload import Workload


@dataclass(frozen=True)
class TrainerProfile:
    """How a trainer computes; the defaults are dtrain's, the others exist for comparisons.

    Attributes:
        attention_copies: the output of attention is copied once to the shape that o_proj reads.
        head_bytes: at the peak of the loss, of each logit.
        train_bytes: of an element of what trains, of its gradient and of each moment.
        residual_bytes: of an element of the residual stream; 0: as what computes.
    """

    attention_copies: bool = True
    head_bytes: float = 12.0
    train_bytes: int = 4
    residual_bytes: int = 0


DTRAIN = TrainerProfile()


def stream_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> int:
    """Bytes of an element of the residual stream: full training under DDP embeds in float32."""
    if profile.residual_bytes:
        return profile.residual_bytes
    return profile.train_bytes if keeps_wide(workload) else workload.element_bytes


def keeps_wide(workload: Workload) -> bool:
    """Weights compute from float32, which autocast copies; FSDP2 gathers them in 16 bits."""
    return workload.is_full and workload.autocasts and workload.engine == "ddp"


def layer_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Saved by one decoder layer for each token, without checkpointing."""
    shape, e = workload.shape, workload.element_bytes
    attention = e * (2 * shape.q + 2 * shape.kv) + 4 * shape.heads
    if shape.soft_cap:  # the quadratic kind: scores capped, softmax in float32, dropout's input
        attention += (2 * e + 4) * shape.heads * workload.sequence_length
    mlp = (2 if MLPS in workload.kernels else 3) * e * shape.mlp
    return (
        _norms(workload, profile)
        + attention
        + mlp
        + _inputs(workload, profile)
        + _adapters(workload)
    )


def _norms(workload: Workload, profile: TrainerProfile) -> float:
    """A norm computes in float32 from a copy; a weight that trains keeps what it multiplies.

    dtrain's own keeps its input as it is.
    """
    shape, stream = workload.shape, stream_bytes(workload, profile)
    kept = 4 + (stream if workload.is_full else 0)
    if NORMS in workload.kernels:
        kept = stream
    total = shape.norms * (kept * shape.hidden + 4)
    if shape.norm_elements > shape.norms * shape.hidden:  # of queries and keys
        total += kept * (shape.q + shape.kv) + 4 * (shape.heads + shape.kv_heads)
    return total


def _copies(workload: Workload) -> bool:
    """Whether each adapter keeps an input of its own: dropped, or cast from PEFT's float32."""
    if LAYERS in workload.kernels:
        return False
    casts = workload.autocasts and workload.method == "lora"
    return not workload.is_full and (workload.has_dropout or casts)


def _inputs(workload: Workload, profile: TrainerProfile) -> float:
    """Inputs of linear layers, once where several share one."""
    e, shape = workload.element_bytes, workload.shape
    if keeps_wide(workload):  # each layer casts the float32 stream for itself
        own = {"self_attn.o_proj": e * shape.q * profile.attention_copies, "mlp.down_proj": 0}
        casts = sum(own.get(x.name, e * x.inputs) for x in shape.linears)
        return casts + e * shape.mlp
    wanted = shape.linears if workload.is_full else workload.adapted
    wanted = tuple(x for x in wanted if x.name != "lm_head")
    if _copies(workload):
        return sum((e + workload.has_dropout) * x.inputs for x in wanted)
    alone = ("self_attn.o_proj", "mlp.down_proj")
    shared = {x.name if x.name in alone else x.name.split(".")[0]: x for x in wanted}
    made_anew = _made_anew(workload)
    total = float(workload.has_dropout * sum(x.inputs for x in wanted))  # one byte an element
    for group, x in shared.items():
        is_there = group in made_anew or (group == alone[0] and not profile.attention_copies)
        total += 0 if is_there else e * x.inputs
    return total


def _made_anew(workload: Workload) -> set[str]:
    """Inputs that the kernels make again from what is kept anyway."""
    if LAYERS not in workload.kernels or workload.is_full:
        return set()
    if workload.engine == "zero3":  # its hooks hand on a copy, which does not know what made it
        return set()
    after_norms = {"self_attn", "mlp"} if NORMS in workload.kernels else set()
    return after_norms | ({"mlp.down_proj"} if MLPS in workload.kernels else set())


def _adapters(workload: Workload) -> float:
    """The small product between A and B."""
    return (
        workload.element_bytes * workload.rank * sum(x.name != "lm_head" for x in workload.adapted)
    )


def saved_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Kept by all decoder layers of a micro-batch."""
    rotary = 2 * workload.element_bytes * workload.shape.head_size * workload.tokens
    if workload.checkpointing:
        width = stream_bytes(workload, profile) * workload.shape.hidden
        return workload.shape.layers * width * workload.tokens + rotary
    return workload.shape.layers * layer_bytes(workload, profile) * workload.tokens + rotary


def forward_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Beside what is saved, while the forward pass is inside one decoder layer, at its MLP."""
    shape = workload.shape
    widths = 2 * shape.mlp + 2 * shape.hidden
    if workload.checkpointing:  # the MLP's two inputs, which nobody saves
        widths += 2 * shape.mlp
    return workload.element_bytes * widths * workload.tokens + dequantized_bytes(workload)


def dequantized_bytes(workload: Workload) -> float:
    """A weight of NF4 while it computes."""
    if workload.method != "qlora":
        return 0.0
    return float(workload.element_bytes * max(x.elements for x in workload.shape.linears))


def recompute_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Beside what is saved, while the backward pass is inside one decoder layer."""
    shape, e = workload.shape, workload.element_bytes
    gradients = (
        2 * e * shape.mlp + stream_bytes(workload, profile) * shape.hidden
    ) * workload.tokens
    if (
        LAYERS in workload.kernels and workload.has_dropout
    ):  # inputs made anew, and what is left of them
        gradients += 2 * e * shape.mlp * workload.tokens
    again = layer_bytes(workload, profile) * workload.tokens if workload.checkpointing else 0.0
    return again + gradients + dequantized_bytes(workload)


def attention_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """As `recompute_bytes`, once the backward pass has left the MLP and what it kept."""
    of_mlp = 5 * workload.element_bytes * workload.shape.mlp * workload.tokens
    return recompute_bytes(workload, profile) - of_mlp


def head_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """At the peak of the loss: log-softmax, its gradient and the logits' gradient, in float32.

    Every token counts as supervised: how many are is not known before the data are read.
    """
    if LOSS in workload.kernels:
        return _chunked_head_bytes(workload, profile)
    shape = workload.shape
    last_norm = (4 + workload.element_bytes * (1 + workload.is_full)) * shape.hidden
    capped = 2 * workload.element_bytes * shape.vocabulary if shape.soft_cap else 0
    return workload.tokens * (profile.head_bytes * shape.vocabulary + last_norm + capped)


def _chunked_head_bytes(workload: Workload, profile: TrainerProfile) -> float:
    """A chunk of logits, the states that are learnt from, their gradient, and the matrix's."""
    shape, e = workload.shape, workload.element_bytes
    rows = min(chunk_rows(shape.vocabulary), workload.tokens)
    # In 16 bits: the product, in float32, and its gradient. A soft cap: its tangent, what it
    # makes of the product, and the gradient of that.
    chunk = 4 * rows * shape.vocabulary * (1 + (e == 2) + 3 * shape.soft_cap)
    # The last layer's output, normalised, and what is learnt of it; its gradient.
    stream = stream_bytes(workload, profile)
    states = workload.tokens * shape.hidden * (3 * stream + e + e * (stream != e))
    matrix = float(shape.vocabulary * shape.hidden)
    if not workload.is_full:
        return chunk + states
    # Its gradient and what a chunk adds to it; DDP's is float32, autocast's copy beside it.
    return chunk + states + (2 * e + 2 * profile.train_bytes * keeps_wide(workload)) * matrix
