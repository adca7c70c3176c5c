"""The kernel for CUDA rounds as the column loop does: on a GPU, and on the CPU in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compressor.decompose import squared_error
from compressor.descent import descended
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


@pytest.mark.skipif(triton.__version__ < "3.9", reason="older interpreters fail with today's numpy")
def test_in_the_interpreter_descent_finds_the_same_codes(
    normal: MakeTensor, correlated: MakeTensor, tmp_path: Path
) -> None:
    w_POI, hessian_II = problem(normal, correlated, 140)
    first = gptq(w_POI, inverse_factor(hessian_II), BITS, GROUP_SIZES)
    torch.save((w_POI, first, hessian_II), tmp_path / "descent.pt")
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__, tmp_path], env=interpreted, check=True, timeout=300)
    found = torch.load(tmp_path / "descended.pt", weights_only=False)
    for peer, ours, before in zip(descended(w_POI, first, hessian_II), found, first, strict=True):
        assert (peer.code_OI != ours.code_OI).float().mean() < 0.01
        assert (before.code_OI != ours.code_OI).float().mean() > 0.01
        assert (peer.scale_OG != ours.scale_OG).float().mean() < 0.02
        assert (before.scale_OG != ours.scale_OG).float().mean() > 0.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("columns", [96, 290, 1024])
def test_on_cuda_descent_leaves_the_cpu_s_error(
    normal: MakeTensor, correlated: MakeTensor, columns: int
) -> None:
    w_POI, hessian_II = problem(normal, correlated, columns)
    first = gptq(w_POI, inverse_factor(hessian_II), BITS, GROUP_SIZES)
    on_card = [
        replace(q, code_OI=q.code_OI.cuda(), scale_OG=q.scale_OG.cuda(), zero_OG=q.zero_OG.cuda())
        for q in first
    ]
    ours = descended(w_POI.cuda(), on_card, hessian_II.cuda())
    for w_OI, found, peer in zip(w_POI, ours, descended(w_POI, first, hessian_II), strict=True):
        error = squared_error(w_OI, found.dequantize().cpu(), hessian_II)
        assert error == pytest.approx(squared_error(w_OI, peer.dequantize(), hessian_II), rel=0.01)


def round_in_the_interpreter(folder: Path) -> None:
    w_POI, factor_II = torch.load(folder / "problem.pt")
    from compressor.gptq_triton import round_block

    state = _State.of(w_POI, factor_II, BITS, GROUP_SIZES)
    _round_halves(state, partial(_round_fused, round_block), FUSED)
    torch.save((state.code_IR, state.scale_SR, state.zero_SR), folder / "found.pt")


def descend_in_the_interpreter(folder: Path) -> None:
    w_POI, first, hessian_II = torch.load(folder / "descent.pt", weights_only=False)
    from compressor import descent, gptq_triton

    descent._kernel = lambda device: gptq_triton.descend_block
    torch.save(descended(w_POI, first, hessian_II), folder / "descended.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (round_in_the_interpreter if (folder / "problem.pt").exists() else descend_in_the_interpreter)(folder)
