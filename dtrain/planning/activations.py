"""Activations that a forward pass keeps for the backward pass, and buffers inside a layer.

All functions return bytes of one rank and one micro-batch, unless they say otherwise.

Letters: T tokens of a micro-batch, h hidden size, q and kv widths of queries and of keys, f width
of the MLP, V vocabulary, e bytes of an element of the compute dtype (2 or 4).

The terms are what autograd saves in transformers' decoder layers with attention per document
(dtrain/models/attention.py), logits of target positions only (dtrain/models/loss.py), PEFT's
LoRA layers and keyed dropout (dtrain/models/dropout.py). Compared layer by layer with real ranks on
a CPU, they agree to 0.5 % (tests/distributed/test_plan_real.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.kernel_table import ADAPTED_LAYERS, LOSS, MLPS, NORMS
from dtrain.planning.workload import Workload

CHUNK_BYTES = 1 << 28  # float32 logits of one chunk; each chunk reads the whole output matrix


DISTILL_COPIES = 6
"""Copies of a chunk's logits in a divergence: two log-softmaxes, their mixture, three terms."""


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits that the chunked loss computes at once, the same on every rank.

    A multiple of 256 or 128 where the vocabulary allows: such sizes suit a GPU's matrix products.
    """
    limit = CHUNK_BYTES // (4 * vocabulary)
    multiple = next((n for n in (256, 128) if n <= limit), 1)
    return max(1, limit - limit % multiple)


@dataclass(frozen=True)
class TrainerProfile:
    """How a trainer computes; the defaults are dtrain's, others exist for comparisons.

    Attributes:
        attention_copies: the output of attention is copied once, to the shape that o_proj reads.
        head_bytes: bytes of each logit at the peak of the loss.
        train_bytes: bytes of an element of a trained parameter, its gradient and each moment.
        residual_bytes: bytes of an element of the residual stream; 0: the compute dtype's.
    """

    attention_copies: bool = True
    head_bytes: float = 12.0
    train_bytes: int = 4
    residual_bytes: int = 0


DTRAIN = TrainerProfile()


def stream_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> int:
    """Bytes of an element of the residual stream; float32 where the embeddings stay float32."""
    if profile.residual_bytes:
        return profile.residual_bytes
    return profile.train_bytes if computes_from_float32(workload) else workload.element_bytes


def computes_from_float32(workload: Workload) -> bool:
    """Whether autocast copies float32 weights; an engine that shards them gathers 16 bits."""
    is_gathered = workload.capabilities.shards_base
    return workload.traits.trains_base and workload.autocasts and not is_gathered


def layer_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Bytes that the decoder layer which saves most saves for each token, without checkpointing."""
    return max(_layer_bytes(kind, profile) for kind in workload.kinds)


def _layer_bytes(workload: Workload, profile: TrainerProfile) -> float:
    """The same, where all decoder layers are alike."""
    shape, e = workload.shape, workload.element_bytes
    scores = 4 * shape.heads
    if shape.soft_cap:  # all scores are stored: capped, softmax in float32, input of the dropout
        scores += (2 * e + 4) * shape.heads * workload.sequence_length
    spares = MLPS in workload.kernels and not shape.experts  # experts keep all three
    mlp = (2 if spares else shape.mlp_saved) * shape.mlp
    return (
        _norm_bytes(workload, profile)
        + scores
        + e * (shape.saved or 2 * shape.q + 2 * shape.kv + mlp)
        + _expert_bytes(workload)
        + _linear_input_bytes(workload, profile)
        + e * sum(workload.adapter_saved(x) for x in workload.adapted if x.name != "lm_head")
        + _saved_output_bytes(workload)
    )


def _expert_bytes(workload: Workload) -> float:
    """Bytes a token of what routing to experts saves: inputs in the order of experts, outputs, and
    what their last layer reads.

    The width of all MLPs of a token is in `ModelShape.mlp`.
    """
    shape = workload.shape
    widths = sum(2 * x.active * shape.hidden for x in shape.experts[:1])
    if not shape.saved:
        widths += sum(x.active * x.inputs for x in shape.experts[1:])
    return workload.element_bytes * widths


def _norm_bytes(workload: Workload, profile: TrainerProfile) -> float:
    """Bytes a token that the norms of a layer save.

    A norm computes in float32 from a copy, and a trained weight keeps what it multiplies. dtrain's
    own norm keeps its input in its dtype.
    """
    shape, stream = workload.shape, stream_bytes(workload, profile)
    element = 4 + (stream if workload.traits.trains_base else 0)
    if NORMS in workload.kernels:
        element = stream
    total = shape.norms * (element * shape.hidden + 4)
    if shape.norm_elements > shape.norms * shape.hidden:  # norms of queries and keys
        total += element * (shape.q + shape.kv) + 4 * (shape.heads + shape.kv_heads)
    return total


def _linear_input_bytes(workload: Workload, profile: TrainerProfile) -> float:
    """Bytes a token of the saved inputs of linear layers; layers that share one save it once."""
    e, shape = workload.element_bytes, workload.shape
    if computes_from_float32(workload):  # each layer casts the float32 stream for itself
        attention_output = e * shape.q * profile.attention_copies
        cast = {"self_attn.o_proj": attention_output, "mlp.down_proj": 0}
        casts = sum(cast.get(x.name, e * x.inputs) for x in shape.linears)
        return casts + e * shape.mlp
    linears = workload.adapted
    if workload.traits.trains_base:
        linears = tuple(x for x in shape.linears if workload.layers_that_train(x))
    linears = tuple(x for x in linears if x.name != "lm_head")
    if not workload.method.saves_inputs:
        return float(workload.method.has_dropout * sum(x.inputs for x in linears))
    if _adapters_copy_inputs(workload):
        return sum((e + workload.method.has_dropout) * x.inputs for x in linears)
    unshared = ("self_attn.o_proj", "mlp.down_proj")
    shared = {x.name if x.name in unshared else x.name.split(".")[0]: x for x in linears}
    if shape.saved:  # all other inputs are counted there
        shared = {k: x for k, x in shared.items() if x.reads_stream(shape.hidden)}
    recomputed = _recomputed_inputs(workload)
    total = float(
        workload.method.has_dropout * sum(x.inputs for x in linears)
    )  # mask: a byte an element
    for group, linear in shared.items():
        is_output_of_attention = group == unshared[0] and not profile.attention_copies
        if group not in recomputed and not is_output_of_attention:
            total += e * linear.inputs
    return total


def _saved_output_bytes(workload: Workload) -> float:
    """Bytes a token of outputs of adapted layers, where nothing else saves them."""
    if not workload.method.saves_outputs:
        return 0.0
    outputs = {x.name: x.outputs for x in workload.adapted if x.name != "lm_head"}
    if ADAPTED_LAYERS not in workload.kernels:  # PEFT's layers: the products of base and adapter
        return 2.0 * workload.element_bytes * sum(outputs.values())
    also_saved = ("self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj")
    return float(
        workload.element_bytes * sum(n for name, n in outputs.items() if name not in also_saved)
    )


def _adapters_copy_inputs(workload: Workload) -> bool:
    """Whether each adapter saves its own input: after dropout, or cast for PEFT's float32."""
    if ADAPTED_LAYERS in workload.kernels:
        return False
    casts = workload.autocasts and not workload.traits.quantizes_base
    return workload.traits.adds_adapter and (workload.method.has_dropout or casts)


def _recomputed_inputs(workload: Workload) -> set[str]:
    """Groups of linear layers whose input the kernels recompute from what is saved anyway."""
    if ADAPTED_LAYERS not in workload.kernels or workload.traits.trains_base:
        return set()
    if workload.capabilities.copies_layer_inputs:  # a copy does not know what computed it
        return set()
    after_norms = {"self_attn", "mlp"} if NORMS in workload.kernels else set()
    return after_norms | ({"mlp.down_proj"} if MLPS in workload.kernels else set())


def saved_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Bytes that all decoder layers save."""
    shape, reached = workload.shape, workload.backward_share  # layers below save nothing
    rotary = 2 * workload.element_bytes * shape.head_size * workload.tokens
    if workload.checkpointing:
        width = stream_bytes(workload, profile) * shape.hidden
        return reached * shape.layers * width * workload.tokens + rotary
    kinds = workload.kinds
    layers = sum(kind.shape.layers * _layer_bytes(kind, profile) for kind in kinds)
    return reached * layers * workload.tokens + rotary


def forward_bytes(workload: Workload) -> float:
    """Bytes needed in addition to the saved ones while the forward pass computes an MLP."""
    shape = workload.shape
    widths = 2 * shape.mlp + 2 * shape.hidden
    if workload.checkpointing:  # the two inputs of the MLP's product, which are not saved
        widths += 2 * shape.mlp
    return workload.element_bytes * widths * workload.tokens + dequantized_bytes(workload)


def dequantized_bytes(workload: Workload) -> float:
    """Bytes of the largest NF4 weight, dequantized while it computes."""
    if not workload.traits.quantizes_base:
        return 0.0
    return float(workload.element_bytes * workload.shape.largest_packed)


def backward_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Bytes needed in addition to the saved ones while the backward pass is in a layer's MLP."""
    shape, e = workload.shape, workload.element_bytes
    width = 2 * e * shape.mlp + stream_bytes(workload, profile) * shape.hidden
    gradients = width * workload.tokens
    if ADAPTED_LAYERS in workload.kernels and workload.method.has_dropout:
        gradients += 2 * e * shape.mlp * workload.tokens  # recomputed inputs, after dropout too
    recomputed = 0.0
    if workload.checkpointing:
        recomputed = layer_bytes(workload, profile) * workload.tokens
    return recomputed + gradients + dequantized_bytes(workload)


def attention_backward_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Bytes as in `backward_bytes`, after the backward pass has freed what the MLP saved."""
    mlp = 5 * workload.element_bytes * workload.shape.mlp * workload.tokens
    return backward_bytes(workload, profile) - mlp


def head_bytes(workload: Workload, profile: TrainerProfile = DTRAIN) -> float:
    """Bytes at the peak of the loss: log-softmax, its gradient and the logits' gradient in float32.

    Counts every token as a target: how many are is not known before the data are read.
    """
    if LOSS in workload.kernels:
        return _chunked_head_bytes(workload, profile)
    shape, e = workload.shape, workload.element_bytes
    last_norm = (4 + e * (1 + workload.traits.trains_base)) * shape.hidden
    capped = 2 * e * shape.vocabulary if shape.soft_cap else 0
    logits = workload.tokens * (profile.head_bytes * shape.vocabulary + last_norm + capped)
    has_copy = workload.trains_matrices and not workload.traits.trains_base
    width = e if workload.capabilities.is_deepspeed else profile.train_bytes
    return logits + has_copy * width * shape.vocabulary * shape.hidden  # the gradient of the copy


def _chunked_head_bytes(workload: Workload, profile: TrainerProfile) -> float:
    """Bytes of a chunk of logits, of the hidden states at targets, and of their gradients."""
    shape, e = workload.shape, workload.element_bytes
    rows = min(chunk_rows(shape.vocabulary), workload.tokens)
    # In 16 bits: the product, its float32 copy, and its gradient. With a soft cap also the tangent,
    # the capped product, and the gradient of that.
    copies = 1 + (e == 2) + 3 * shape.soft_cap + DISTILL_COPIES * workload.distills
    chunk = 4 * rows * shape.vocabulary * copies
    # The last layer's output, its norm, the states at targets, and their gradient.
    stream = stream_bytes(workload, profile)
    states = workload.tokens * shape.hidden * (3 * stream + e + e * (stream != e))
    matrix = float(shape.vocabulary * shape.hidden)
    if workload.token_rows:  # the matrix with these rows in it, and a gradient of its size
        return chunk + states + 3 * e * matrix
    if not workload.method.trains_outer:
        return chunk + states
    # The gradient of the output matrix and a chunk's contribution to it; under DDP the gradient is
    # float32 and exists next to autocast's copy.
    float32_bytes = 2 * profile.train_bytes * computes_from_float32(workload)
    return chunk + states + (2 * e + float32_bytes) * matrix
