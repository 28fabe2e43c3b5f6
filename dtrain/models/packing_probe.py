"""Whether a model keeps the documents of a packed row apart: asked of the model, not of a list.

A model of the same config computes two short documents alone, as transformers does, and in one
row, as the trainer calls it. It costs about a second for a model of any size, because

- linear layers are products of two thin random matrices, and all weights are views of one pool of
  random numbers, so that full widths take neither memory nor time;
- of layers that are built alike the first two stay;
- windows, chunks and the original length of a rotary embedding are shorter than the documents.

None of these changes which token a token sees. Letters: T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dtrain.config import schema
from dtrain.core.errors import UserError
from dtrain.models.kernels import native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import for_training, freeze_for_training, quiet
from dtrain.models.loss import target_logits
from dtrain.models.outline import first_line, without_weights

CPU = torch.device("cpu")
DOCUMENTS = (9, 14)  # tokens of each
WINDOW, ORIGINAL = 5, 12  # the first is shorter than both documents, the second is in between
TOKENS = 1000  # ids are below it: what follows the words of a vocabulary may stand for images
TOLERANCE = 1e-4  # of the largest logit; float32 stays far below
RANK = 8  # of a linear layer's weight
POOL = 1 << 22  # random numbers that weights are views of
SMALL = 1 << 16  # elements of a parameter that is built as the model's code does


@dataclass(frozen=True)
class Layout:
    """How documents go through a model.

    Attributes:
        packed: several in a row are exact; if not, each takes a forward pass of its own.
        reason: why not.
    """

    packed: bool
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """What the trainer gives to a forward pass.

    Attributes:
        input_ids, position_ids: int64 [1, T].
        predict: int64 [T], every position.
    """

    input_ids: Tensor
    position_ids: Tensor
    target_positions: Tensor
    document_lengths: list[int]

    @classmethod
    def of(cls, documents: list[Tensor]) -> Row:
        """A row of documents, int64 [n] each."""
        ids, lengths = torch.cat(documents), [len(document) for document in documents]
        positions = torch.cat([torch.arange(length) for length in lengths])
        return cls(ids[None], positions[None], torch.arange(len(ids)), lengths)


class Unfit(Exception):
    """The model cannot be trained; the text says why."""


def probe_packing(config: PretrainedConfig, settings: schema.Model) -> Layout:
    """Find out how documents must go through a model.

    Args:
        config: from `read_config`; not changed.
        settings: of the recipe.

    Raises:
        UserError: it cannot be trained either way: it is not causal, or its code fails.
    """
    vocabulary = min(TOKENS, config.get_text_config(decoder=True).vocab_size)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(vocabulary, (n,), generator=generator) for n in DOCUMENTS]
    loops_are_on = native.is_on()
    for all_layers in (False, True):  # some code counts on the number of layers
        try:
            with quiet(), torch.no_grad():
                return _layout(thin_model(config, settings, all_layers=all_layers), documents)
        except UserError:
            raise
        except Exception as error:  # whatever a model's code raises
            why = str(error) if isinstance(error, Unfit) else f"its code fails: {first_line(error)}"
            failure = error
        finally:
            native.switch(on=loops_are_on)
    raise UserError(
        f"{config.model_type!r} cannot be trained: {why}",
        where="model.base",
        fix="choose a causal language model that transformers computes without errors",
    ) from failure


def _layout(model: PreTrainedModel, documents: list[Tensor]) -> Layout:
    """Compare logits [T, V] of documents alone and in a row.

    Raises:
        Unfit: neither is right.
    """
    first, second = documents
    other = torch.cat([first[:-1], second[-1:]])
    model.train()  # as it is trained; dropout is off
    alone = [_alone(model, document) for document in documents]
    same = _comparison(alone)
    changed = _alone(model, other)
    if not same(changed[:-1], alone[0][:-1]):
        repeats = same(_alone(model, first), alone[0])
        raise Unfit(
            "its predictions depend on tokens that follow" if repeats else "it computes at random"
        )
    if same(changed[-1:], alone[0][-1:]):
        raise Unfit("its predictions do not depend on its input")
    for document, expected in ((first, alone[0]), (other, changed)):
        try:
            logits = target_logits(model, Row.of([document, second])).float()
        except Exception as error:
            return Layout(packed=False, reason=f"it takes no row of documents: {first_line(error)}")
        if not same(logits, torch.cat([expected, alone[1]])):
            return Layout(packed=False, reason="its predictions depend on other documents of a row")
    return Layout(packed=True)


def _comparison(logits: list[Tensor]) -> Callable[[Tensor, Tensor], bool]:
    """Whether two tensors are alike, by the size of the logits."""
    size = float(torch.cat(logits).abs().max())
    if not size < float("inf"):
        raise Unfit("its logits are not finite")
    return lambda one, another: bool((one - another).abs().max() <= TOLERANCE * size)


def _alone(model: PreTrainedModel, document: Tensor) -> Tensor:
    """Logits [T, V] of one document, by transformers' plain call."""
    logits: Tensor = model(input_ids=document[None], use_cache=False).logits[0]
    return logits.float()


def thin_model(
    config: PretrainedConfig, settings: schema.Model, *, all_layers: bool
) -> PreTrainedModel:
    """A model with thin random weights, prepared as for training on this CPU, in float32.

    Raises:
        UserError: it lacks the attention that the recipe names.
    """
    if settings.attention == "flash_attention_2":  # what a GPU would take in the place of "auto"
        settings = settings.model_copy(update={"attention": "auto"})
    config = for_training(with_short_lengths(config), settings, torch.float32, CPU)
    model = without_weights(config, torch.float32, settings.trust_remote_code, kept_elements=SMALL)
    if not all_layers:
        _drop_repeated_layers(model)
    pool = Pool()
    _thin_out(model, pool)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                value = _weight(module, parameter, pool)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    freeze_for_training(model, settings)
    apply_kernels(model, settings)
    return model


def with_short_lengths(config: PretrainedConfig) -> PretrainedConfig:
    """A copy whose windows, chunks and original lengths are within the probe's documents."""
    config = copy.deepcopy(config)
    for values in _groups(config):
        if "dynamic" in str(values.get("rope_parameters")):  # it calls the original length so
            values["max_position_embeddings"] = ORIGINAL
        for name, value in values.items():
            if type(value) is not int or value <= WINDOW:
                continue
            if "window" in name or "chunk" in name:
                values[name] = WINDOW
            elif name == "original_max_position_embeddings":
                values[name] = ORIGINAL
    return config


def _groups(config: PretrainedConfig | dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The values of a config and of those inside it."""
    values = config if isinstance(config, dict) else vars(config)
    yield values
    for value in list(values.values()):
        if isinstance(value, dict | PretrainedConfig):
            yield from _groups(value)


def _drop_repeated_layers(model: nn.Module) -> None:
    """Cut every list of layers behind the first of each kind, and behind two at least."""
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 2]:
        if not all(sum(isinstance(m, nn.Linear | Conv1D) for m in x.modules()) > 1 for x in layers):
            continue
        settings = [_settings(layer) for layer in layers]
        counters = {
            key for key, value in settings[0].items() if (value, settings[1].get(key)) == (0, 1)
        }
        kinds: dict[Hashable, int] = {}
        for number, found in enumerate(settings):
            kind = tuple((key, value) for key, value in found.items() if key not in counters)
            kinds.setdefault(kind, number)
        del layers[max(1, *kinds.values()) + 1 :]


def _settings(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """What a layer is built like: its modules' classes, plain attributes and shapes."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        found[name, "class"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, str | bool | int | float | None):
                found[name, key] = value
        for key, parameter in module._parameters.items():
            found[name, key] = None if parameter is None else parameter.shape
    return found


def _thin_out(model: nn.Module, pool: Pool) -> None:
    """Put a thin layer in the place of every linear one that is not small."""
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
            setattr(parent, name, ThinLinear(pool, inputs, outputs, layer.bias))


def is_plain_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class computes as torch's linear layer, however it is written."""
    layer, x = nn.Linear(3, 5), torch.ones(1, 2, 3)
    try:
        return torch.allclose(kind.forward(layer, x), layer(x))
    except Exception:  # it needs more than a weight and a bias
        return False


def _weight(module: nn.Module, parameter: nn.Parameter, pool: Pool) -> Tensor:
    """A parameter's value, large enough that whatever passes through it shows."""
    shape = parameter.shape
    if isinstance(module, nn.Embedding):
        return pool.rows(*shape)
    noise = pool.view(*shape) * (0.1 if len(shape) < 2 else prod(shape[1:]) ** -0.5)
    return noise if parameter.is_meta else parameter.detach() + noise


class Pool:
    """Random numbers from which weights of any size take views."""

    def __init__(self) -> None:
        self._numbers = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
        self._next = self._turns = 0

    def view(self, *shape: int) -> Tensor:
        """Normal numbers, others at each call; alike along the first axis where they are many."""
        size = prod(shape)
        if size > POOL:
            return self.view(*shape[1:]).expand(shape)
        if self._next + size > POOL:
            self._turns += 1
            self._next = min(self._turns, POOL - size)
        start, self._next = self._next, self._next + size
        return self._numbers[start : self._next].view(shape)

    def rows(self, count: int, width: int) -> Tensor:
        """[count, width] of an embedding; rows overlap."""
        return self._numbers.as_strided((count, width), ((POOL - width) // count, 1))


class ThinLinear(nn.Module):
    """A linear layer whose weight has rank RANK, and whose output is as large as its input.

    Args:
        bias: [out], of the layer that it stands for.
    """

    def __init__(self, pool: Pool, inputs: int, outputs: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = inputs, outputs, bias
        self._down, self._up = pool.view(RANK, inputs), pool.view(outputs, RANK)
        self._scale = (RANK * inputs) ** -0.5

    @property
    def weight(self) -> Tensor:
        """For code that asks for its dtype or shape: [out, in] of one random row."""
        return (self._down[:1] * self._scale).expand(self.out_features, -1)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out]."""
        return linear(linear(x, self._down) * self._scale, self._up, self.bias)
