"""Times GPTQ of one matrix at six widths on CUDA against the plain column loop, in the same run.

    python -m benchmarks.gptq_cuda                       # 4096 × 14336, group 64, as in Llama-3-8B's down_proj
    python -m benchmarks.gptq_cuda --rows 1024 --columns 4096

Peer: the published loop, one width after the other, column by column in blocks of 128, with the same grid search at
the start of each group. Floors: the products that spread errors from block to block, run without any rounding, and
their operations at the rate of a large float32 product. TF32 is off throughout.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor

from compressor.cuda.scaled_half import largest_of
from compressor.grid import Grid, Quantized, search_grid
from compressor.lowrank.hessian import squared_error
from compressor.quantize.gptq import FUSED, LEAF, Factor, _Leaf, _State, gptq, in_halves, inverse_factor

WIDTHS = (2, 3, 4, 5, 6, 8)
Answer = tuple[float, list[Quantized]]


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random weights, and a Hessian of correlated inputs with a few loud channels."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    x_TI = normal(2 * columns, columns)
    for shift in (1, 7, 64):
        x_TI += 0.5 * x_TI.roll(shift, dims=1)
    x_TI *= 1 + 10 * (normal(columns) > 2.5)
    return 0.02 * normal(rows, columns), x_TI.T @ x_TI / len(x_TI)


def plain_loop(w_OI: Tensor, factor_II: Tensor, bits: int, group_size: int, block: int = 128) -> Quantized:
    """GPTQ as published (arXiv 2210.17323, algorithm 1), for one width."""
    w_OI, code_OI = w_OI.clone(), torch.empty_like(w_OI, dtype=torch.uint8)
    rows, columns = w_OI.shape
    maximum_O = w_OI.new_full((rows,), 2.0**bits - 1)
    grids: list[Grid] = []
    for start in range(0, columns, block):
        end = min(start + block, columns)
        block_OC, error_OC = w_OI[:, start:end].clone(), torch.zeros_like(w_OI[:, start:end])
        factor_CC = factor_II[start:end, start:end]
        for column in range(end - start):
            if (start + column) % group_size == 0:
                group_gO = block_OC[:, column : column + group_size].T.contiguous()
                diagonal_g = factor_CC.diagonal()[column : column + group_size]
                grids.append(search_grid(group_gO, diagonal_g.square().reciprocal()[:, None], maximum_O))
            w_O = block_OC[:, column]
            code_O = grids[-1].encode(w_O)
            code_OI[:, start + column] = code_O
            error_O = (w_O - grids[-1].decode(code_O)) / factor_CC[column, column]
            block_OC[:, column:] -= error_O[:, None] @ factor_CC[column, column:][None]
            error_OC[:, column] = error_O
        w_OI[:, end:] -= error_OC @ factor_II[start:end, end:]
    scale_OG = torch.stack([grid.scale_R for grid in grids], dim=1).bfloat16()
    zero_OG = torch.stack([grid.zero_R for grid in grids], dim=1).to(torch.uint8)
    return Quantized(code_OI, scale_OG, zero_OG, bits, group_size)


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Median wall time of `run`, the device idle before and after."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(perf_counter() - begin)
    return statistics.median(times)


def timed(run: Callable[[], list[Quantized]]) -> Answer:
    found: list[Quantized] = []
    return seconds(lambda: found.extend(run())), found


def product_rate() -> float:
    """Operations per second of a large float32 product."""
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    a @ b
    return 2 * 8192**3 / seconds(lambda: a @ b, 5)


def report(
    w_OI: Tensor, hessian_II: Tensor, factor_II: Tensor, group_size: int, repeats: int
) -> Iterator[str]:
    rows, columns = w_OI.shape
    groups = [group_size] * len(WIDTHS)
    w_POI = w_OI.expand(len(WIDTHS), -1, -1)
    factor = Factor(factor_II)

    def begun() -> _State:
        return _State.of(torch.cat(list(w_POI.mT), dim=1), largest_of(w_OI), factor, WIDTHS, groups)

    def fused() -> list[Quantized]:
        return gptq(w_POI, factor_II, WIDTHS, groups)

    def column_loop() -> None:
        state = begun()
        in_halves(_Leaf(state), state.spread, LEAF, 0, len(state.w_IR))

    def products_alone() -> float:
        state = begun()
        state.error_IR.values.zero_()
        in_halves(lambda *_: None, state.spread, FUSED, 0, len(state.w_IR))
        return seconds(lambda: in_halves(lambda *_: None, state.spread, FUSED, 0, len(state.w_IR)), repeats)

    def search() -> None:
        search_grid(group_gO, factor_II.diagonal()[:group_size, None], w_OI.new_full((rows,), 15.0))

    first_s, ours = timed(fused)
    ours_s = seconds(fused, repeats)
    products_s = products_alone()
    plain_loop(w_OI[:, :256], factor_II[:256, :256], 4, group_size)
    plain_s, plain = timed(lambda: [plain_loop(w_OI, factor_II, bits, group_size) for bits in WIDTHS])
    group_gO = w_OI[:, :group_size].T.contiguous()
    search_s = seconds(search, 10) * len(WIDTHS) * len(plain[0].scale_OG.T)
    batched_s = seconds(column_loop)
    floor_s = len(WIDTHS) * rows * columns**2 / product_rate()
    yield f"{torch.cuda.get_device_name()}: {rows} × {columns}, group {group_size}, widths {WIDTHS}"
    yield f"{f'fused (first call {first_s:.2f} s)':34s}{ours_s * 1e3:10.1f} ms"
    for title, peer_s in (
        ("plain column loop", plain_s),
        ("  without its grid searches", plain_s - search_s),
        ("batched column loop, no kernel", batched_s),
    ):
        yield f"{title:34s}{peer_s * 1e3:10.1f} ms {peer_s / ours_s:8.1f} × as long"
    for title, least_s in (
        ("its products alone", products_s),
        ("their operations at full rate", floor_s),
    ):
        yield f"{title:34s}{least_s * 1e3:10.1f} ms {ours_s / least_s:8.2f} × this floor"
    yield "bits   codes that differ   scales that differ   error / plain's error   plain, block 64: codes, error"
    for bits, found, peer in zip(WIDTHS, ours, plain, strict=True):
        base = squared_error(w_OI, peer.dequantize(), hessian_II)
        ratio = squared_error(w_OI, found.dequantize(), hessian_II) / base
        line = f"{bits:4d} {differ(found, peer):18.2e} {scales_differ(found, peer):20.2e} {ratio:22.6f}"
        if bits in (2, 4, 8):
            other = plain_loop(w_OI, factor_II, bits, group_size, block=64)
            other_ratio = squared_error(w_OI, other.dequantize(), hessian_II) / base
            line += f" {differ(other, peer):18.2e} {other_ratio:.6f}"
        yield line


def differ(one: Quantized, other: Quantized) -> float:
    return (one.code_OI != other.code_OI).float().mean().item()


def scales_differ(one: Quantized, other: Quantized) -> float:
    return (one.scale_OG != other.scale_OG).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    w_OI, hessian_II = problem(arguments.rows, arguments.columns)
    factor_II = inverse_factor(hessian_II)
    for line in report(w_OI, hessian_II, factor_II, arguments.group_size, arguments.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
