"""The error of every option of a layer in closed form, corrected by the few that were measured.

What lives here: the closed form, the regression that corrects it, which options to measure first. Measuring is in
`sweep.py`; the smooth curve through all points is in `error_model.py`.

    E(b, r, g) ≈ K_bg · (Σ_oi s_o d_i w_oi² / Σ_o s_o (W H Wᵀ)_oo) · τ(r) · exp(φᵀβ),

with φ = (1, f, s, log τ, s f, f log τ).

K_bg is the mean squared error of a searched grid on standard normal numbers. d_i are the pivots of H = L D Lᵀ: GPTQ's
output error is exactly Σ_oi d_i e_oi², e its rounding errors (QuIP, arXiv 2307.13304, Theorem 1), of which descent
takes some 10 %. τ(r) is the share of a plain option's output error beyond its r leading directions, all that rank r
could leave. φ bends this: f = 4^(2 − b) fades as the grid grows finer, s = 1 where there are factors, whose rounding
costs and whose alternation gains.

β has a normal prior and a linear posterior given measured log errors (n, K letters: n measurements, K = 6 features).
The prior is what the 84 layers of a Llama of 22 M parameters have, its spread somewhat widened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from allocator.storage import Option
from compressor.cuda.scaled_half import Operand, product
from compressor.grid import search_grid
from compressor.lowrank.factorize import leading_directions, through
from compressor.lowrank.hessian import Curvature
from profiler.prediction.calibration_factor import CONFIDENCE
from profiler.prediction.error_model import FLOOR
from profiler.prediction.measurement import Measurement

Floats = NDArray[np.float64]
PRIOR_MEAN = np.array([-0.10, 0.06, -0.09, 0.27, -0.02, 0.22])
PRIOR_SPREAD = np.array([0.05, 0.1, 0.1, 0.2, 0.06, 0.13])
NOISE = 0.02
"""Spread of a log error about the form."""
SAMPLE_ROWS = 4096
"""Groups of normal numbers that K_bg is taken from."""
FIRST_BITS = (2, 3, 4)
RANKED_BITS = 3


@lru_cache
def grid_constant(bits: int, group_size: int) -> float:
    """K_bg: the mean squared error of rounding standard normal numbers to a searched grid."""
    normal_gO = torch.randn(SAMPLE_ROWS, group_size, generator=torch.Generator().manual_seed(0)).T
    # In plain torch: compiling what rounds on a CPU takes far longer than this.
    grid = search_grid(normal_gO, torch.ones(group_size, 1), torch.full((SAMPLE_ROWS,), 2.0**bits - 1))
    return (grid.decode(grid.encode(normal_gO)) - normal_gO).square().mean().item()


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """scale: Σ_oi s_o d_i w_oi² over Σ_o s_o (W H Wᵀ)_oo; left_over: τ by rank; columns: I."""

    scale: float
    left_over: dict[int, float]
    columns: int

    @classmethod
    def of(
        cls,
        w_OI: Tensor,
        share_O: Tensor,
        residual: Operand,
        curvature: Curvature,
        signal: float,
        ranks: Sequence[int],
    ) -> ClosedForm | None:
        """From a layer and the residual of a plain option; None where there is no error to speak of.

        w (O, I) float32, residual (O, I); share_O is what an error of each row counts, signal Σ_O s_O (W H Wᵀ)_OO.
        """
        scale = (share_O @ w_OI.square() @ curvature.factor.pivots()).item() / max(signal, 1e-30)
        weighted = through(residual, curvature.root)
        total = weighted.squared_norms(1).item()
        if scale <= FLOOR or total <= FLOOR * signal:
            return None
        left_over = {0: 1.0}
        if ranks:
            direction_Or = leading_directions([weighted], max(ranks))[0]
            led_r = (
                product(Operand.of(direction_Or.T, 1.0), weighted)
                .square()
                .sum(dim=1)
                .double()
                .cumsum(dim=0)
                .tolist()
            )
            left_over |= {rank: max(1 - led_r[rank - 1] / total, 1e-6) for rank in ranks}
        return cls(scale, left_over, w_OI.shape[1])

    def log_error(self, option: Option) -> float:
        """Before any correction; the last group of a row may be short."""
        short = self.columns % option.group_size
        constant = (1 - short / self.columns) * grid_constant(option.bits, option.group_size)
        if short:
            constant += short / self.columns * grid_constant(option.bits, short)
        return math.log(constant * self.scale * self.left_over[option.rank])

    def features(self, option: Option) -> Floats:
        """φ (K,)."""
        coarse, ranked = 4.0 ** (2 - option.bits), float(option.rank > 0)
        log_left = math.log(self.left_over[option.rank])
        return np.array([1.0, coarse, ranked, log_left, ranked * coarse, log_left * coarse])


@dataclass(frozen=True, slots=True)
class Corrected:
    """A closed form with the posterior of β: mean (K,), covariance (K, K).

    leave_one_out: root mean square of log(predicted / measured), every measurement predicted from the others. Where
    those are wider than they should be, `widening` is by how much. quantile is Student's, for as many measurements.
    """

    form: ClosedForm
    mean_K: Floats
    covariance_KK: Floats
    leave_one_out: float
    widening: float
    quantile: float

    def estimate(self, option: Option) -> Measurement:
        """The error predicted, and the half width of its 90 % interval in log error."""
        phi_K = self.form.features(option)
        deviation = math.sqrt(phi_K @ self.covariance_KK @ phi_K + NOISE**2)
        error = math.exp(self.form.log_error(option) + phi_K @ self.mean_K)
        return Measurement(option, error, self.quantile * self.widening * deviation)


def corrected(form: ClosedForm, measurements: Sequence[Measurement]) -> Corrected:
    """The posterior given what was measured, two options at least."""
    phi_nK = np.stack([form.features(m.option) for m in measurements])
    y_n = np.array([math.log(max(m.error, FLOOR)) - form.log_error(m.option) for m in measurements])
    mean_K, covariance_KK = _posterior(phi_nK, y_n)
    ratio_n, z_n = [], []
    for n in range(len(y_n)):
        others = np.arange(len(y_n)) != n
        without_K, spread_KK = _posterior(phi_nK[others], y_n[others])
        ratio_n.append(phi_nK[n] @ without_K - y_n[n])
        z_n.append(ratio_n[n] / math.sqrt(phi_nK[n] @ spread_KK @ phi_nK[n] + NOISE**2))
    return Corrected(
        form,
        mean_K,
        covariance_KK,
        leave_one_out=float(np.sqrt(np.square(ratio_n).mean())),
        widening=max(1.0, float(np.sqrt(np.square(z_n).mean()))),
        quantile=float(stdtrit(len(y_n), (1 + CONFIDENCE) / 2)),
    )


def _posterior(phi_nK: Floats, y_n: Floats) -> tuple[Floats, Floats]:
    precision_KK = np.diag(PRIOR_SPREAD**-2) + phi_nK.T @ phi_nK / NOISE**2
    covariance_KK = np.asarray(np.linalg.inv(precision_KK), np.float64)
    mean_K: Floats = PRIOR_MEAN + covariance_KK @ phi_nK.T @ (y_n - phi_nK @ PRIOR_MEAN) / NOISE**2
    return mean_K, covariance_KK


def first_measured(options: Sequence[Option]) -> list[Option]:
    """What is measured of a layer before anything is predicted: plain at 2, 3 and 4 bits, two ranks at 3 bits.

    Where the grid lacks these, what is nearest to them; what no form predicts is measured too.
    """
    formed = predictable(options)
    plain, mixed = [o for o in formed if not o.rank], [o for o in formed if o.rank]
    base = min({o.group_size for o in plain}, key=lambda size: abs(size - 64))
    at_base = [o for o in plain if o.group_size == base]
    usual = [o for o in at_base if o.bits in FIRST_BITS]
    chosen = usual if len(usual) > 1 else at_base
    if mixed:
        bits = min({o.bits for o in mixed}, key=lambda b: (abs(b - RANKED_BITS), b))
        size = min({o.group_size for o in mixed}, key=lambda s: abs(s - base))
        alike = sorted((o for o in mixed if (o.bits, o.group_size) == (bits, size)), key=lambda o: o.rank)
        chosen = [*chosen, *dict.fromkeys((alike[0], alike[-1]))]
    return [*chosen, *(o for o in options if o not in formed)]


def predictable(options: Sequence[Option]) -> list[Option]:
    """The options that one form describes: plain ones, and ranks beside bits whose factors have the fewest bits; of
    inputs as they are."""
    fewest = min((o.factor_bits for o in options if o.rank), default=0)
    return [o for o in options if o.bits and not o.rotated and o.factor_bits in (0, fewest)]


def spectrum_option(options: Sequence[Option]) -> Option:
    """The plain option whose residual gives τ: of those measured first, the one of most bits."""
    return max((o for o in first_measured(predictable(options)) if not o.rank), key=lambda o: o.bits)
