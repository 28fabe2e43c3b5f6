"""The compiled packing gives bitsandbytes' own bits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from dtrain.models.quantize import pack_natively

# bitsandbytes' own, in a process where nothing stands in for it.
PLAIN = """
import io, sys, torch
from bitsandbytes.functional import quantize_4bit
given, out = sys.argv[1:]
made = [quantize_4bit(x, quant_type=kind, blocksize=size, compress_statistics=double)
        for x, kind, size, double in torch.load(given)]
torch.save([(bits, state.as_dict(packed=True)) for bits, state in made], out)
"""
SHAPES = [(64, 64), (3, 5), (1, 64), (129, 96), (50, 1), (200, 320)]


def test_packed_bits_equal_bitsandbytes(tmp_path) -> None:
    torch.manual_seed(0)
    cases = []
    for shape in SHAPES:
        x = torch.randn(shape) * torch.logspace(-20, 2, shape[0])[:, None]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            cases += [(x.to(dtype), kind, 64, True) for kind in ("nf4", "fp4")]
    cases += [(torch.zeros(64, 64), "nf4", 64, False), (torch.randn(64, 64), "nf4", 128, False)]
    bounds = torch.linspace(-1, 1, 1 << 16)  # including values on the bounds of the codes
    cases.append((bounds.view(-1, 64), "nf4", 4096, False))
    torch.save(cases, tmp_path / "given")
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "given"), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    theirs = torch.load(tmp_path / "out")
    assert pack_natively()
    for (x, kind, size, double), (bits, state) in zip(cases, theirs, strict=True):
        ours = quantize_4bit(x, quant_type=kind, blocksize=size, compress_statistics=double)
        assert torch.equal(ours[0], bits)
        packed_state = ours[1].as_dict(packed=True)
        assert packed_state.keys() == state.keys()
        assert all(torch.equal(packed_state[key], state[key]) for key in state)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_non_finite_values_stay_non_finite(odd: float) -> None:
    assert pack_natively()
    x = torch.ones(4, 64)
    x[2, 30] = odd
    bits, state = quantize_4bit(x, quant_type="nf4")
    assert not dequantize_4bit(bits, state).isfinite().all()
