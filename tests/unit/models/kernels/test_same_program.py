"""Two functions are the same program only if they compute the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2MLP, Qwen2RMSNorm

from dtrain.models.kernels.same_program import same_program

HEAD = """
import logging
from functools import wraps
logger = logging.getLogger("{name}")
SCALE = {scale}
def helper(x):
    return x {operator} SCALE
def decorated(function):
    @wraps(function)
    def call(*args):
        return function(*args){after}
    return call
"""
BODY = """
def forward(self, x, factor={default}, *, shift={shift}):
    {docstring}
    if x is None:
        logger.warning("none")
    {local} = helper(x) * factor + shift
    many = [value + {constant} for value in ({local},)]
    for number in range(3):
        many.append(number)
    return (lambda found: found * {inner})(many[0])
"""
PLAIN = {
    "name": "one", "scale": "2.0", "operator": "*", "after": "", "default": "1", "shift": "0",
    "docstring": "pass", "local": "y", "constant": "1.0", "inner": "3",
}  # fmt: skip


def written(decorator: str = "", **changes: str) -> FunctionType:
    names: dict[str, Any] = {}
    sources = PLAIN | changes
    exec(HEAD.format(**sources) + decorator + BODY.format(**sources), names)
    forward: FunctionType = names["forward"]
    return forward


def test_local_names_docstrings_and_loggers_do_not_count() -> None:
    right = written(name="two", docstring='"""Says something."""', local="elsewhere")
    right.__doc__ = "replaced by a decorator"
    assert same_program(written(), right)


def test_used_docstring_counts_as_a_constant() -> None:
    left, right = (written(docstring=f'"{text}"; x = x or "{text}"') for text in "ab")
    assert not same_program(left, right)


@pytest.mark.parametrize(
    ("case", "value"),
    [
        ("scale", "3.0"), ("operator", "+"), ("default", "2"), ("default", "1.0"), ("shift", "1"),
        ("constant", "1"), ("constant", "-1.0"), ("inner", "4"),
    ],
)  # fmt: skip
def test_different_computation_counts(case: str, value: str) -> None:
    assert not same_program(written(), written(**{case: value}))


def test_decorators_count() -> None:
    assert not same_program(written(), written("@decorated"))
    assert same_program(written("@decorated"), written("@decorated"))
    assert not same_program(written("@decorated"), written("@decorated", after=" * 2"))
    assert not same_program(written("@decorated"), written("@decorated", scale="5.0"))


def test_closures_count() -> None:
    def scaled(by: float) -> Callable[[float], float]:
        def call(x: float) -> float:
            return x * by

        return call

    assert same_program(scaled(2.0), scaled(2.0))
    assert not same_program(scaled(2.0), scaled(3.0))
    assert not same_program(scaled(0.0), scaled(-0.0))


def test_methods_of_the_class_count() -> None:
    class Doubled(nn.Module):
        def inner(self, x: Any) -> Any:
            return x * 2

        def forward(self, x: Any) -> Any:
            return self.inner(x)

    class Tripled(Doubled):
        def inner(self, x: Any) -> Any:
            return x * 3

    assert same_program(Doubled.forward, Doubled.forward, (Doubled, Doubled))
    assert not same_program(Tripled.forward, Doubled.forward, (Tripled, Doubled))


def test_recursive_functions_terminate() -> None:
    left, right = written(), written()
    for function in (left, right):
        function.__globals__["helper"] = function
    assert same_program(left, right)


def test_copies_of_llama_in_transformers_are_recognized() -> None:
    forward = llama.LlamaForCausalLM.forward
    assert same_program(Qwen2ForCausalLM.forward, forward)
    assert same_program(MistralForCausalLM.forward, forward)
    assert same_program(Qwen2RMSNorm.forward, llama.LlamaRMSNorm.forward)
    assert same_program(Qwen2MLP.forward, llama.LlamaMLP.forward)
    assert not same_program(GemmaRMSNorm.forward, llama.LlamaRMSNorm.forward)
    assert not same_program(Olmo2RMSNorm.forward, llama.LlamaRMSNorm.forward)


def test_changed_helper_of_llama_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = FunctionType(
        llama.apply_rotary_pos_emb.__code__,
        {**vars(llama), "rotate_half": lambda x: torch.roll(x, 1, -1)},
        argdefs=llama.apply_rotary_pos_emb.__defaults__,
    )
    assert not same_program(copies, llama.apply_rotary_pos_emb)


def test_non_functions_are_never_the_same() -> None:
    assert not same_program(len, len)
    assert not same_program(wraps, None)
