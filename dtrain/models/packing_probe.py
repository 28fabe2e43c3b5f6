"""Probes whether a model separates the documents of a packed sequence.

A model of the same config computes two short documents alone, as transformers does, and in one
sequence, as the trainer does. The probe takes about a second for a model of any size, because

- linear layers have rank 8, and all weights are views of one pool of random numbers, so that full
  widths take neither memory nor time;
- of layers that are built alike only the first two are kept;
- windows, chunks, the original length of a rotary embedding and what an indexer chooses are shorter
  than the documents.

None of this changes which token sees which. Letters: T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dtrain.config import schema
from dtrain.core.errors import UserError, first_line
from dtrain.models.kernels import native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import freeze_for_training, prepare_config, silence_transformers
from dtrain.models.loss import target_logits
from dtrain.models.meta_model import build_without_parameters

CPU = torch.device("cpu")
DOCUMENTS = (9, 14)  # tokens of each document
WINDOW, ORIGINAL = 5, 12  # shorter than both documents, and between their lengths
CHOSEN, BLOCK = 4, 2  # what an indexer chooses, tokens or blocks, and the tokens of a block
TOKENS = 1000  # token ids are below this: later ids may stand for images
TOLERANCE = 1e-4  # relative to the largest logit; float32 errors are far smaller
RANK = 8  # of each linear layer's weight
POOL = 1 << 22  # random numbers that weights are views of
SMALL = 1 << 16  # parameters of at most this many elements are built by the model's code


@dataclass(frozen=True)
class Layout:
    """How documents are laid out in forward passes.

    Attributes:
        packed: several documents in a sequence; otherwise one forward pass each.
        reason: why documents cannot be packed.
    """

    packed: bool
    reason: str = ""


@dataclass(frozen=True)
class ProbeSequence:
    """A packed sequence, as the trainer passes it to the model.

    Attributes:
        input_ids, position_ids: int64 [1, T].
        target_positions: int64 [T], every position.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_positions: Tensor
    document_lengths: list[int]

    @classmethod
    def of(cls, documents: list[Tensor]) -> ProbeSequence:
        """Pack documents, int64 [n] each."""
        ids, lengths = torch.cat(documents), [len(document) for document in documents]
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(ids[None], positions[None], torch.arange(len(ids)), lengths)


class UntrainableError(Exception):
    """The model cannot be trained; the message says why."""


def probe_packing(
    config: PretrainedConfig, settings: schema.Model, new_tokens: Sequence[int] = ()
) -> Layout:
    """Find out whether a model separates packed documents.

    Args:
        config: from `read_config`; not changed.
        settings: the recipe's `model` group.
        new_tokens: numbers of the tokens that the run has added, of which the documents have some.

    Raises:
        UserError: it cannot be trained at all: it is not causal, or its code fails.
    """
    vocabulary = min(TOKENS, config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(vocabulary, (n,), generator=generator) for n in DOCUMENTS]
    if new_tokens:
        documents[0][0], documents[1][0] = min(new_tokens), max(new_tokens)
    loops_are_on = native.is_enabled()
    for all_layers in (False, True):  # some models need all their layers
        try:
            with silence_transformers(), torch.no_grad():
                return _layout(
                    build_probe_model(config, settings, all_layers=all_layers), documents
                )
        except UserError:
            raise
        except Exception as error:  # a model's code may raise anything
            why = (
                str(error)
                if isinstance(error, UntrainableError)
                else f"its code fails: {first_line(error)}"
            )
            failure = error
        finally:
            native.set_enabled(on=loops_are_on)
    raise UserError(
        f"{config.model_type!r} cannot be trained: {why}",
        where="model.base",
        fix="choose a causal language model that transformers computes without errors",
    ) from failure


def _layout(model: PreTrainedModel, documents: list[Tensor]) -> Layout:
    """Compare logits [T, V] of documents computed alone and packed.

    Raises:
        UntrainableError: neither way is correct.
    """
    first, second = documents
    variant = torch.cat([first[:-1], second[-1:]])
    model.train()  # as in training; dropout is off
    alone = [_alone(model, document) for document in documents]
    same = _comparison(alone)
    changed = _alone(model, variant)
    if not same(changed[:-1], alone[0][:-1]):
        repeats = same(_alone(model, first), alone[0])
        raise UntrainableError(
            "its predictions depend on tokens that follow" if repeats else "it computes at random"
        )
    if same(changed[-1:], alone[0][-1:]):
        raise UntrainableError("its predictions do not depend on its input")
    for document, expected in ((first, alone[0]), (variant, changed)):
        try:
            logits = target_logits(model, ProbeSequence.of([document, second])).float()
        except Exception as error:
            return Layout(packed=False, reason=f"it takes no row of documents: {first_line(error)}")
        if not same(logits, torch.cat([expected, alone[1]])):
            return Layout(packed=False, reason="its predictions depend on other documents of a row")
    return Layout(packed=True)


def _comparison(logits: list[Tensor]) -> Callable[[Tensor, Tensor], bool]:
    """A function that compares two tensors, relative to the size of the logits."""
    size = float(torch.cat(logits).abs().max())
    if not size < float("inf"):
        raise UntrainableError("its logits are not finite")
    return lambda first, second: bool((first - second).abs().max() <= TOLERANCE * size)


def _alone(model: PreTrainedModel, document: Tensor) -> Tensor:
    """Logits [T, V] of one document, by an ordinary call of transformers' model."""
    logits: Tensor = model(input_ids=document[None], use_cache=False).logits[0]
    return logits.float()


def build_probe_model(
    config: PretrainedConfig, settings: schema.Model, *, all_layers: bool
) -> PreTrainedModel:
    """Build a model with low-rank random weights, prepared for training on this CPU in float32.

    Raises:
        UserError: it lacks the attention implementation that the recipe names.
    """
    if settings.attention == "flash_attention_2":  # which needs a GPU
        settings = settings.model_copy(update={"attention": "auto"})
    config = prepare_config(shorten_lengths(config), settings, torch.float32, CPU)
    model = build_without_parameters(
        config, torch.float32, settings.trust_remote_code, kept_elements=SMALL
    )
    if not all_layers:
        _drop_repeated_layers(model)
    pool = RandomPool()
    _reduce_ranks(model, pool)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                value = _weight(module, parameter, pool)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    freeze_for_training(model, settings)
    apply_kernels(model, settings)
    return model


def shorten_lengths(config: PretrainedConfig) -> PretrainedConfig:
    """Copy a config whose windows, chunks, choices and original lengths are short."""
    config = copy.deepcopy(config)
    for values in _groups(config):
        if "dynamic" in str(values.get("rope_parameters")):  # there it is the original length
            values["max_position_embeddings"] = ORIGINAL
        for name, value in values.items():
            short = _short_length(str(name))
            if type(value) is int and short is not None and value > short:
                values[name] = short
    return config


def _short_length(name: str) -> int | None:
    """The length that a setting of this name gets, at most; None if it is no length."""
    if name.startswith("index"):
        if re.search("topk|budget", name):
            return CHOSEN
        return BLOCK if re.search("block|pool|ratio", name) else None
    if "window" in name or "chunk" in name:
        return WINDOW
    return ORIGINAL if name == "original_max_position_embeddings" else None


def _groups(config: PretrainedConfig | dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The attributes of a config and of the configs inside it."""
    values = config if isinstance(config, dict) else vars(config)
    yield values
    for value in list(values.values()):
        if isinstance(value, dict | PretrainedConfig):
            yield from _groups(value)


def _drop_repeated_layers(model: nn.Module) -> None:
    """Cut every list of layers after the first of each kind, keeping at least two."""
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 2]:
        if not all(sum(isinstance(m, nn.Linear | Conv1D) for m in x.modules()) > 1 for x in layers):
            continue
        settings = [_settings(layer) for layer in layers]
        counters = {
            key for key, value in settings[0].items() if (value, settings[1].get(key)) == (0, 1)
        }
        kinds: dict[Hashable, int] = {}
        for index, layer_settings in enumerate(settings):
            kind = tuple(
                (key, value) for key, value in layer_settings.items() if key not in counters
            )
            kinds.setdefault(kind, index)
        del layers[max(1, *kinds.values()) + 1 :]


def _settings(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """The classes, plain attributes and parameter shapes of a layer's modules."""
    settings: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        settings[name, "class"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, str | bool | int | float | None):
                settings[name, key] = value
        for key, parameter in module._parameters.items():
            settings[name, key] = None if parameter is None else parameter.shape
    return settings


def _reduce_ranks(model: nn.Module, pool: RandomPool) -> None:
    """Replace every linear layer that is not small by a low-rank one."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not any(parameter.is_meta for parameter in layer.parameters()):
                continue
            if isinstance(layer, Conv1D):
                inputs, outputs = layer.weight.shape
            elif isinstance(layer, nn.Linear) and is_plain_linear(type(layer)):
                outputs, inputs = layer.weight.shape
            else:
                continue
            setattr(parent, name, LowRankLinear(pool, inputs, outputs, layer.bias))


def is_plain_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of nn.Linear computes the same as nn.Linear."""
    layer, x = nn.Linear(3, 5), torch.ones(1, 2, 3)
    try:
        return torch.allclose(kind.forward(layer, x), layer(x))
    except Exception:  # it needs more than a weight and a bias
        return False


def _weight(module: nn.Module, parameter: nn.Parameter, pool: RandomPool) -> Tensor:
    """Random values of a parameter, large enough that a dependency shows in the logits."""
    shape = parameter.shape
    if isinstance(module, nn.Embedding):
        return pool.rows(*shape)
    noise = pool.view(*shape) * (0.1 if len(shape) < 2 else prod(shape[1:]) ** -0.5)
    return noise if parameter.is_meta else parameter.detach() + noise


class RandomPool:
    """Random numbers of which weights of any size are views."""

    def __init__(self) -> None:
        self._numbers = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
        self._next = self._turns = 0

    def view(self, *shape: int) -> Tensor:
        """Normal numbers, different at each call; a tensor larger than the pool repeats them."""
        size = prod(shape)
        if size > POOL:
            return self.view(*shape[1:]).expand(shape)
        if self._next + size > POOL:
            self._turns += 1
            self._next = min(self._turns, POOL - size)
        start, self._next = self._next, self._next + size
        return self._numbers[start : self._next].view(shape)

    def rows(self, count: int, width: int) -> Tensor:
        """An embedding [count, width] whose rows overlap."""
        return self._numbers.as_strided((count, width), ((POOL - width) // count, 1))


class LowRankLinear(nn.Module):
    """A linear layer whose weight has rank RANK, and whose output is about as large as its input.

    Args:
        bias: [out], of the layer that it replaces.
    """

    def __init__(
        self, pool: RandomPool, inputs: int, outputs: int, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, bias
        self._down, self._up = pool.view(RANK, inputs), pool.view(outputs, RANK)
        self._scale = (RANK * inputs) ** -0.5

    @property
    def weight(self) -> Tensor:
        """[out, in] of one repeated row, for code that reads its dtype or shape."""
        return (self._down[:1] * self._scale).expand(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return linear(linear(x, self._down) * self._scale, self._up, self.bias)
