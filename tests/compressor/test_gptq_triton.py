"""The kernel for CUDA rounds as the column loop does: on a GPU, and on the CPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.decompose import squared_error
from compressor.gptq import FUSED, _round_fused, _round_halves, _State, gptq, inverse_factor

triton = pytest.importorskip("triton")

MakeTensor = Callable[..., Tensor]
BITS, GROUP_SIZES, ROWS = [2, 4, 3], [32, 64, 128], 9


def problem(normal: MakeTensor, correlated: MakeTensor, columns: int) -> tuple[Tensor, Tensor]:
    w_POI = normal(len(BITS), ROWS, columns)
    w_POI[0, :, 7], w_POI[1, 3], w_POI[2, 5, 64:] = 0, 0, 20
    return w_POI, correlated(columns)


@pytest.mark.skipif(triton.__version__ < "3.9", reason="older interpreters fail with today's numpy")
def test_in_the_interpreter_it_finds_the_loop_s_codes_and_grids(
    normal: MakeTensor, correlated: MakeTensor, tmp_path: Path
) -> None:
    w_POI, hessian_II = problem(normal, correlated, 140)
    factor_II = inverse_factor(hessian_II)
    torch.save((w_POI, factor_II), tmp_path / "problem.pt")
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__, tmp_path], env=interpreted, check=True, timeout=300)
    code_IR, scale_SR, zero_SR = torch.load(tmp_path / "found.pt")
    for p, peer in enumerate(gptq(w_POI, factor_II, BITS, GROUP_SIZES)):
        rows, slots = slice(ROWS * p, ROWS * p + ROWS), slice(None, None, GROUP_SIZES[p] // 32)
        assert (peer.code_OI != code_IR[:, rows].T).float().mean() < 0.01
        assert (peer.scale_OG.float() != scale_SR[slots, rows].T).float().mean() < 0.01
        assert (peer.zero_OG.float() != zero_SR[slots, rows].T).float().mean() < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("columns", [96, 290, 1024])
def test_on_cuda_it_leaves_the_loop_s_error(normal: MakeTensor, correlated: MakeTensor, columns: int) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns)
    factor_II = inverse_factor(hessian_II)
    found = gptq(w_POI.cuda(), factor_II.cuda(), BITS, GROUP_SIZES)
    for w_OI, ours, peer in zip(w_POI, found, gptq(w_POI, factor_II, BITS, GROUP_SIZES), strict=True):
        error = squared_error(w_OI, ours.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.01)
        assert (ours.code_OI.cpu() != peer.code_OI).float().mean() < 0.02


def round_in_the_interpreter(folder: Path) -> None:
    w_POI, factor_II = torch.load(folder / "problem.pt")
    from compressor.gptq_triton import round_block

    state = _State.of(w_POI, factor_II, BITS, GROUP_SIZES)
    _round_halves(state, partial(_round_fused, round_block), FUSED, 0, w_POI.shape[2])
    torch.save((state.code_IR, state.scale_SR, state.zero_SR), folder / "found.pt")


if __name__ == "__main__":
    round_in_the_interpreter(Path(sys.argv[1]))
