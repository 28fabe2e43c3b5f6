"""AdaLoRA's training (arXiv:2303.10512): orthogonal P and Q, and ranks where they matter most.

A layer's adapter is P Λ Q. The loss has the mean over all P and Q of |PᵀP - I| or |QQᵀ - I|, in the
Frobenius norm: as in the authors' code and in PEFT, where the paper writes its square.

The sensitivity I = |w g| of each element and its uncertainty are averaged over the updates,

    Ī = β Ī + (1 - β) I,   Ū = β Ū + (1 - β) |I - Ī|,

and a triplet of λ_i, column i of P and row i of Q has the score s(λ_i) + mean s(P_i) + mean s(Q_i),
with s = Ī Ū. After some updates, λ is set to 0 except in the triplets of all layers with the
highest scores. As in the paper's algorithm 1, w is the value that the gradient g belongs to, not
the updated one that PEFT's loop multiplies with it, and the last cut counts its own update.

Each rank keeps Ī and Ū of its own ranges, in the checkpoints.

Letters: r rank, o outputs and h inputs of a layer; P [o, r] is PEFT's lora_B, Λ [r, 1] its lora_E,
Q [r, h] its lora_A.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora import AdaLoraLayer
from torch import Tensor

from dtrain.checkpoints.parameter_shards import GRADIENT, WEIGHT, ParameterShard
from dtrain.config.methods import AdaLora
from dtrain.config.methods.adalora import BETA
from dtrain.config.schema import Stage
from dtrain.core.log import say
from dtrain.objectives.base import Objective, ShardedModel, StageContext
from dtrain.objectives.regularizers.layer_terms import LayersTerm

SENSITIVITY, UNCERTAINTY = "sensitivity", "uncertainty"  # kinds of a checkpoint


class RankAllocation(LayersTerm):
    """An objective with AdaLoRA's term, which cuts ranks after updates."""

    term = "orthogonality"

    def __init__(self, stage: Stage, inner: Objective) -> None:
        assert isinstance(stage.method, AdaLora)
        super().__init__(stage, inner)
        self.method = stage.method
        self.shards: list[ParameterShard] = []  # of the adapters, with views of the weights
        self.averages: dict[str, dict[str, Tensor]] = {}  # by parameter and kind
        self.sensitivities: dict[str, Tensor] = {}  # of the update under way
        self.cut: dict[str, Tensor] = {}  # which λ are 0 for good

    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.world = context.world

    def begin_training(self, engine: ShardedModel) -> None:
        super().begin_training(engine)
        modules = engine.module.named_modules()
        layers: dict[str, Any] = {name: m for name, m in modules if isinstance(m, AdaLoraLayer)}
        self.penalize({name: (module, Orthogonality(module)) for name, module in layers.items()})
        self.term_weight = self.method.orthogonality_weight / (2 * len(layers))
        self.shards = [shard for shard in engine.parameter_shards() if is_adapter(shard.name)]
        for shard in self.shards:
            if WEIGHT in shard.tensors:
                zeros = torch.zeros_like(shard.tensors[WEIGHT])
                self.averages[shard.name] = {SENSITIVITY: zeros, UNCERTAINTY: zeros.clone()}
        engine.kept |= self.averages

    @torch.no_grad()
    def before_update(self, engine: ShardedModel) -> None:
        super().before_update(engine)
        for shard in engine.parameter_shards(gradients=True):
            if is_adapter(shard.name) and GRADIENT in shard.tensors:
                weight, gradient = shard.tensors[WEIGHT], shard.tensors[GRADIENT]
                self.sensitivities[shard.name] = (weight * gradient).abs().float()
                if ".lora_E." in shard.name:
                    self.cut[shard.name] = weight == 0

    @torch.no_grad()
    def after_update(self, engine: ShardedModel, step: int, *, updated: bool) -> None:
        super().after_update(engine, step, updated=updated)
        if not updated:
            return
        update, updates = step + 1, self.loader.steps
        if self.method.is_final(update, updates):
            self._set_zero(engine, self.cut)
            return
        self._average()
        layers = len(self.layers)
        if (budget := self.method.budget(update, updates, layers)) is not None:
            self._allocate(engine, budget)

    def _average(self) -> None:
        """Add the sensitivities of an update to the averages."""
        for name, now in self.sensitivities.items():
            mean, uncertainty = self.averages[name].values()
            mean.lerp_(now, 1 - BETA)
            uncertainty.lerp_((now - mean).abs(), 1 - BETA)

    def _allocate(self, engine: ShardedModel, budget: int) -> None:
        """Set λ to 0 except in the `budget` triplets of all layers with the highest scores."""
        scores = self._scores(engine.replica[1])
        flat = torch.cat(list(scores.values()))
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[flat.argsort(descending=True, stable=True)[:budget]] = True
        by_layer = dict(zip(scores, kept.split([len(s) for s in scores.values()]), strict=True))
        cut = {
            s.name: ~by_layer[layer_of(s.name)][s.start : s.stop].to(s.tensors[WEIGHT].device)
            for s in self.shards
            if ".lora_E." in s.name and s.tensors
        }
        self._set_zero(engine, cut)
        ranks = [int(k.sum()) for k in by_layer.values()]
        say(f"ranks: {sum(ranks)} of {len(flat)} are kept, {min(ranks)} to {max(ranks)} in a layer")

    def _scores(self, replicas: int) -> dict[str, Tensor]:
        """The scores of the triplets of each layer, float64 [r] on the CPU, on every rank."""
        scores: dict[str, Tensor] = {}
        for shard in self.shards:
            total = scores.setdefault(layer_of(shard.name), torch.zeros(self.method.r).double())
            if shard.name in self.averages:
                mean, uncertainty = self.averages[shard.name].values()
                score = mean.new_zeros(shard.shape)
                score.view(-1)[shard.start : shard.stop] = mean * uncertainty
                of_outputs = ".lora_B." in shard.name
                total += score.double().mean(dim=0 if of_outputs else 1).cpu() / replicas
        self.world.sum_tensors(list(scores.values()))
        return scores

    def _set_zero(self, engine: ShardedModel, cut: dict[str, Tensor]) -> None:
        """Set the weights of these parameters to 0 where `cut` says so."""
        for shard in self.shards:
            if shard.name in cut:
                shard.tensors[WEIGHT].masked_fill_(cut[shard.name], 0.0)
        engine.on_weights_changed()


def is_adapter(parameter: str) -> bool:
    """Whether a parameter is of P, Λ or Q, and not of a module that trains whole."""
    return ".lora_" in parameter


def layer_of(parameter: str) -> str:
    """The name of the layer that a parameter of an adapter belongs to."""
    return parameter.partition(".lora_")[0]


class Orthogonality:
    """|QQᵀ - I| + |PᵀP - I| of a layer."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def weights(self) -> tuple[Tensor, Tensor]:
        """Q and P."""
        (name,) = self.module.active_adapters
        return self.module.lora_A[name], self.module.lora_B[name]

    def value(self, q: Tensor, p: Tensor) -> Tensor:
        """The sum of both distances."""
        return _excess(q).norm() + _excess(p.t()).norm()

    def gradient(self, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of `value` by q and p."""
        return _distance_gradient(q), _distance_gradient(p.t()).t()


def _excess(rows: Tensor) -> Tensor:
    """X Xᵀ - I of X [r, n], float32."""
    rows = rows.float()
    return rows @ rows.t() - torch.eye(len(rows), device=rows.device)


def _distance_gradient(rows: Tensor) -> Tensor:
    excess = _excess(rows)
    return 2 * (excess @ rows.float()) / excess.norm().clamp_min(torch.finfo(torch.float32).tiny)
