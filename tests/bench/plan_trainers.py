"""How the trainers behind published figures compute, according to their code at that time.

This adds what dtrain never keeps to the plan's own moments; `plan_points.py` compares the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.planning.activations import DTRAIN, TrainerProfile
from dtrain.planning.engine_models import build_engine_model
from dtrain.planning.kernel_table import MLPS, NORMS
from dtrain.planning.workload import Workload


@dataclass(frozen=True)
class Trainer:
    """How a source computes, according to its code at the time of its figures.

    Attributes:
        words: must all occur in a row; the first trainer that matches is used.
        kernels: what torch.compile fuses as dtrain's kernels do.
        fused: its optimizer makes no copy of all second moments.
        keeps_inputs: keeps inputs of NF4 layers for an unused gradient of frozen weights:
            bitsandbytes before pull request 1270 (July 2024).
        keeps_dequantized: the recomputed layer's graph keeps its dequantized weights: AutoGPTQ.
        masters: DeepSpeed in 16 bits: float32 masters and moments, their gradients at an update,
            two buckets of 2e8 elements going backward.
    """

    words: tuple[str, ...]
    rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    has_dropout: bool = False
    casts: bool = False
    profile: TrainerProfile = DTRAIN
    kernels: frozenset[str] = frozenset()
    fused: bool = False
    keeps_inputs: bool = False
    keeps_dequantized: bool = False
    masters: bool = False


def profile(head: float, train: int = 2, residual: int = 0) -> TrainerProfile:
    """A trainer that keeps `head` bytes of each logit and `train` bytes of a trained element."""
    return TrainerProfile(
        attention_copies=False, train_bytes=train, head_bytes=head, residual_bytes=residual
    )


# Bytes of a logit at the peak of the loss. transformers until 4.44: logits in float32, shifted by a
# copy, their log-softmax: 12, going backward 12 again; 16 where the loop keeps the model's output.
# Qwen's own model does not widen them: 6 where no autocast does, 12 under it. Chunks (torchtune):
# all logits in 16 bits and the gradient of an eighth of them, float32 only inside compiled loops.
SIX = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
WITHOUT_K = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINERS = (
    # train.py: r 64, dropout 0.1, pure bfloat16, `output` is kept until the step is over.
    Trainer(("AnswerDotAI",), 64, SIX, True, profile=profile(16), keeps_inputs=True),
    # README and its configs: q, v, o and the MLP with r 8; chunked, compiled, a fused AdamW.
    Trainer(("torchtune", "(eager)"), fused=True, profile=profile(12)),
    Trainer(
        ("torchtune", "compile"),
        8,
        WITHOUT_K,
        fused=True,
        profile=profile(2.25),
        kernels=frozenset({NORMS, MLPS}),
    ),
    # Tutorial of LoRA: r 64 on every matrix, else q and v with r 8.
    Trainer(("torchtune", "r64"), 64, profile=profile(12)),
    Trainer(("torchtune",), 8, ("q_proj", "v_proj"), profile=profile(12)),
    # finetune/lora.py: r 8 on q and v, dropout 0.05; logits in chunks of 128; bitsandbytes 0.41.1.
    Trainer(("litgpt",), 8, ("q_proj", "v_proj"), True, profile=profile(5.5), keeps_inputs=True),
    # finetune.py and its scripts: PEFT of 2023 made adapters in the base's dtype. QLoRA goes by way
    # of DeepSpeed in float16 over GPTQ's weights, LoRA of autocast, 72B of ZeRO-3.
    Trainer(
        ("QwenLM", "qlora"),
        64,
        has_dropout=True,
        profile=profile(6),
        keeps_dequantized=True,
        masters=True,
    ),
    Trainer(("QwenLM", "zero3"), 64, has_dropout=True, profile=profile(6)),
    Trainer(("QwenLM",), 64, has_dropout=True, profile=profile(12)),
    Trainer(("unsloth",), 32, profile=profile(14, 4, 4), casts=True),
    Trainer(("peft",), 8, has_dropout=True, casts=True, profile=profile(12, 4), keeps_inputs=True),
)


def trainer_of(row: dict[str, str]) -> Trainer | None:
    text = " ".join(row.values())
    return next((t for t in TRAINERS if all(word in text for word in t.words)), None)


def tensors(workload: Workload, trainer: Trainer) -> float:
    """Bytes at the moment that needs most, as the trainer computes."""
    moments = build_engine_model(workload, trainer.profile).moments()
    return max(x.peak + also_kept(x.moment, workload, trainer) for x in moments)


def also_kept(moment: str, workload: Workload, trainer: Trainer) -> float:
    """Bytes that dtrain never keeps, minus gradients that do not exist yet."""
    shape, e, n = workload.shape, workload.element_bytes, workload.trainable
    layers = 1 if workload.checkpointing else shape.layers
    within = moment == "backward" or (moment == "loss" and not workload.checkpointing)
    kept = 0.0
    if trainer.keeps_inputs and workload.method.kind == "qlora" and within:
        kept += layers * workload.tokens * e * (2 * shape.hidden + shape.mlp)
    if trainer.keeps_dequantized and moment == "backward":
        kept += e * shape.linear_elements / shape.layers
    if trainer.masters:
        kept += 8 * n + {"update": 4 * n, "backward": 2 * e * 2e8}.get(moment, 0)
    if moment != "update" and workload.ranks == 1:  # cleared at each step, so not there yet
        kept -= build_engine_model(workload, trainer.profile).gradient_bytes
    return kept
