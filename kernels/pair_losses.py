"""Pair losses: one function each, of the log-probs of a chosen completion w and a rejected one l.

Notation of DPO (arXiv:2305.18290). l(y) = log pi(y), summed over the completion's tokens, and
|y| their number; rho(y) = l(y) - log pi_ref(y); delta = rho(w) - rho(l); h(z) = -log sigmoid(z);
sg stops the gradient. With label smoothing e, f(z) becomes (1 - e) f(z) + e f(-z).

A loss is a link (h, a hinge, a square) of a score, for a target: most are one line of algebra. It
takes its hyperparameters as keyword arguments, and returns what `objective` makes. Add one here and
name it in LOSSES, where it becomes a `loss_type` of `preference_loss` and of `prefuse dpo`. Losses
that read something more, such as a judge's margin, are in informed_pair_losses.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .kl import LARGEST_EXPONENT
from .launch import expect
from .objective import Objective
from .preference_parts import Pair, logistic, objective, smoothed


def sigmoid(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """DPO, arXiv:2305.18290: h(beta delta); cDPO with label smoothing."""
    chosen, rejected = pair.log_ratios()
    loss = smoothed(logistic, beta * (chosen - rejected), label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def sigmoid_norm(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """DPO on log-ratios per token, arXiv:2411.15124: h(beta (rho(w) / |w| - rho(l) / |l|))."""
    chosen, rejected = pair.mean_log_ratios()
    loss = smoothed(logistic, beta * (chosen - rejected), label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def robust(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Objective:
    """Robust DPO, arXiv:2403.00409: [(1 - e) h(z) - e h(-z)] / (1 - 2 e), z = beta delta, e < 1/2.

    Unbiased where a share e of the labels is flipped; it can be negative.
    """
    expect(0 <= label_smoothing < 0.5, "label_smoothing", "0 to below 1/2", label_smoothing)
    chosen, rejected = pair.log_ratios()
    z, e = beta * (chosen - rejected), label_smoothing
    loss = ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)
    return objective(loss, beta * chosen, beta * rejected)


def hinge(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """RSO's hinge, arXiv:2309.06657: max(0, 1 - beta delta)."""
    chosen, rejected = pair.log_ratios()
    loss = smoothed(lambda z: F.relu(1 - z), beta * (chosen - rejected), label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def slic(pair: Pair, *, delta: float = 1.0, nll_coef: float = 1.0) -> Objective:
    """SLiC-HF, arXiv:2305.10425: max(0, delta - l(w) + l(l)) - nll_coef l(w). No reference model.

    Sums, so that delta is in nats of a whole completion; w stands for the paper's SFT target.
    """
    loss = F.relu(delta - pair.chosen + pair.rejected) - nll_coef * pair.chosen
    return objective(loss, pair.chosen, pair.rejected)


def ipo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """IPO, arXiv:2310.12036 eq. 17, per token: (rho(w) / |w| - rho(l) / |l| - 1 / (2 beta))^2.

    beta is the paper's tau. Means, as in TRL and as the authors confirmed there; `ipo_sum` is the
    equation as printed, for which tau depends on the length.
    """
    chosen, rejected = pair.mean_log_ratios()
    loss = smoothed(lambda z: (z - 1 / (2 * beta)) ** 2, chosen - rejected, label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def ipo_sum(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """IPO as printed, arXiv:2310.12036 eq. 17: (delta - 1 / (2 beta))^2, on sums."""
    chosen, rejected = pair.log_ratios()
    loss = smoothed(lambda z: (z - 1 / (2 * beta)) ** 2, chosen - rejected, label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def fdpo_forward_kl(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """f-DPO with forward KL, arXiv:2309.16240: h(beta (s(w) - s(l))), s = -exp(-rho).

    -rho is bounded by LARGEST_EXPONENT.
    """
    chosen, rejected = (-(-rho).clamp(max=LARGEST_EXPONENT).exp() for rho in pair.log_ratios())
    return _scored(chosen, rejected, beta, label_smoothing)


def fdpo_jsd(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Objective:
    """f-DPO with the Jensen-Shannon divergence, arXiv:2309.16240: s = log 2 + log sigmoid(rho)."""
    chosen, rejected = (math.log(2) + F.logsigmoid(rho) for rho in pair.log_ratios())
    return _scored(chosen, rejected, beta, label_smoothing)


def fdpo_alpha(
    pair: Pair, *, beta: float = 0.1, alpha: float = 0.5, label_smoothing: float = 0.0
) -> Objective:
    """f-DPO with an alpha-divergence, arXiv:2309.16240: s = (1 - exp(-alpha rho)) / alpha.

    alpha -> 0 is DPO, 1 forward KL; TRL's f_alpha_divergence_coef is 1 - alpha. -alpha rho is
    bounded by LARGEST_EXPONENT.
    """
    expect(0 < alpha <= 1, "alpha", "a number in (0, 1]", alpha)
    exponents = ((-alpha * rho).clamp(max=LARGEST_EXPONENT) for rho in pair.log_ratios())
    chosen, rejected = (-torch.expm1(x) / alpha for x in exponents)
    return _scored(chosen, rejected, beta, label_smoothing)


def _scored(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Objective:
    loss = smoothed(logistic, beta * (chosen - rejected), label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def exo_pair(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Objective:
    """EXO, arXiv:2402.00856 eq. 16: KL(q || p), q = (sigmoid(z), sigmoid(-z)), p = (1 - e, e).

    z = beta delta and e > 0.
    """
    expect(0 < label_smoothing < 1, "label_smoothing", "between 0 and 1", label_smoothing)
    chosen, rejected = pair.log_ratios()
    z = beta * (chosen - rejected)
    wins = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    loses = (-z).sigmoid() * (F.logsigmoid(-z) - math.log(label_smoothing))
    return objective(wins + loses, beta * chosen, beta * rejected)


def nca_pair(pair: Pair, *, beta: float = 0.1) -> Objective:
    """NCA for K = 2, arXiv:2402.05369: h(beta rho(w)) + (h(-beta rho(w)) + h(-beta rho(l))) / 2."""
    chosen, rejected = (beta * rho for rho in pair.log_ratios())
    loss = logistic(chosen) + (logistic(-chosen) + logistic(-rejected)) / 2
    return objective(loss, chosen, rejected)


def bco_pair(pair: Pair, *, beta: float = 0.1, shift: float = 0.0) -> Objective:
    """BCO on pairs, arXiv:2404.04656: h(beta rho(w) - shift) + h(shift - beta rho(l)).

    The paper's shift is the mean reward, half of each class; 0, as in TRL, leaves it out.
    """
    chosen, rejected = (beta * rho for rho in pair.log_ratios())
    loss = logistic(chosen - shift) + logistic(shift - rejected)
    return objective(loss, chosen, rejected)


def sppo_hard(pair: Pair, *, beta: float = 0.1) -> Objective:
    """SPPO, arXiv:2405.00675 eq. 4.7, p = 1: (rho(w) - 1 / (2 beta))^2 + (rho(l) + 1 / (2 beta))^2.

    beta is the paper's 1 / eta.
    """
    chosen, rejected = pair.log_ratios()
    target = 1 / (2 * beta)
    loss = (chosen - target) ** 2 + (rejected + target) ** 2
    return objective(loss, beta * chosen, beta * rejected)


def apo_zero(pair: Pair, *, beta: float = 0.1) -> Objective:
    """APO-zero, arXiv:2408.06266 eq. 7: 1 - sigmoid(beta rho(w)) + sigmoid(beta rho(l)).

    For w better than the model.
    """
    chosen, rejected = (beta * rho for rho in pair.log_ratios())
    return objective((-chosen).sigmoid() + rejected.sigmoid(), chosen, rejected)


def apo_down(pair: Pair, *, beta: float = 0.1) -> Objective:
    """APO-down, arXiv:2408.06266 eq. 8: sigmoid(beta rho(w)) + 1 - sigmoid(beta delta).

    For w worse than the model: it lowers both.
    """
    chosen, rejected = (beta * rho for rho in pair.log_ratios())
    return objective(chosen.sigmoid() + (rejected - chosen).sigmoid(), chosen, rejected)


def discopop(pair: Pair, *, beta: float = 0.1, tau: float = 0.05) -> Objective:
    """DiscoPOP, arXiv:2406.08414: (1 - m) h(z) + m exp(-z), m = sigmoid(z / tau), z = beta delta.

    At tau = 0.05 it rises around z = 0, where training begins, and falls away from it.
    """
    expect(tau > 0, "tau", "a positive number", tau)
    chosen, rejected = pair.log_ratios()
    z = beta * (chosen - rejected)
    exponential = (F.logsigmoid(z / tau) - z).exp()  # m first: exp(-z) alone overflows
    loss = (-z / tau).sigmoid() * logistic(z) + exponential
    return objective(loss, beta * chosen, beta * rejected)


def simpo(
    pair: Pair, *, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0
) -> Objective:
    """SimPO, arXiv:2405.14734: h(beta (l(w) / |w| - l(l) / |l|) - gamma). No reference model."""
    chosen, rejected = pair.mean_logps()
    loss = smoothed(logistic, beta * (chosen - rejected) - gamma, label_smoothing)
    return objective(loss, beta * chosen, beta * rejected)


def alphapo(pair: Pair, *, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Objective:
    """AlphaPO, arXiv:2501.03884: h(beta (s(w) - s(l)) - gamma), s = (1 - exp(-alpha m)) / alpha.

    m = l / |y|. alpha = 0 is SimPO. -alpha m is bounded by LARGEST_EXPONENT. No reference model.
    """
    means = pair.mean_logps()
    if alpha != 0:
        means = [-torch.expm1((-alpha * x).clamp(max=LARGEST_EXPONENT)) / alpha for x in means]
    chosen, rejected = means
    loss = logistic(beta * (chosen - rejected) - gamma)
    return objective(loss, beta * chosen, beta * rejected)


def cpo(
    pair: Pair, *, beta: float = 0.1, nll_coef: float = 1.0, label_smoothing: float = 0.0
) -> Objective:
    """CPO, arXiv:2401.08417: h(beta (l(w) - l(l))) - nll_coef l(w) / |w|. No reference model."""
    z = beta * (pair.chosen - pair.rejected)
    loss = smoothed(logistic, z, label_smoothing) + nll_coef * pair.mean_nll()
    return objective(loss, beta * pair.chosen, beta * pair.rejected)


def orpo(pair: Pair, *, beta: float = 0.1) -> Objective:
    """ORPO, arXiv:2403.07691: -m(w) + beta h(o(w) - o(l)), m = l / |y|, o = m - log(1 - e^m).

    beta is the paper's lambda. No reference model.
    """
    means = pair.mean_logps()
    chosen, rejected = (m - _log1mexp(m) for m in means)
    loss = pair.mean_nll() + beta * logistic(chosen - rejected)
    return objective(loss, beta * means[0], beta * means[1])


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0; at 0, a probability of 1, what the smallest number below gives."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def rdpo(pair: Pair, *, beta: float = 0.1, alpha: float = 0.01) -> Objective:
    """R-DPO, arXiv:2403.19159: h(beta delta + alpha (|w| - |l|)), from the reward r + alpha |y|."""
    chosen, rejected = pair.log_ratios()
    longer = pair.need("chosen_len") - pair.need("rejected_len")
    loss = logistic(beta * (chosen - rejected) + alpha * longer)
    return objective(loss, beta * chosen, beta * rejected)


def dpop(pair: Pair, *, beta: float = 0.1, penalty: float = 50.0) -> Objective:
    """DPO-Positive, arXiv:2402.13228: h(beta (delta - penalty max(0, -rho(w))))."""
    chosen, rejected = pair.log_ratios()
    loss = logistic(beta * (chosen - rejected - penalty * F.relu(-chosen)))
    return objective(loss, beta * chosen, beta * rejected)


def dpo_nll(pair: Pair, *, beta: float = 0.1, nll_coef: float = 1.0) -> Objective:
    """DPO + NLL (IRPO), arXiv:2404.19733: h(beta delta) - nll_coef l(w) / |w|."""
    chosen, rejected = pair.log_ratios()
    loss = logistic(beta * (chosen - rejected)) + nll_coef * pair.mean_nll()
    return objective(loss, beta * chosen, beta * rejected)


def cal_dpo(pair: Pair, *, beta: float = 0.1) -> Objective:
    """Cal-DPO, arXiv:2412.14516: h(delta) + (rho(w) - 1 / (2 beta))^2 + (rho(l) + 1 / (2 beta))^2.

    DPO, and SPPO's squares, which pin the log-ratios themselves. delta stands without beta there.
    The authors' code halves the squares.
    """
    chosen, rejected = pair.log_ratios()
    target = 1 / (2 * beta)
    loss = logistic(chosen - rejected) + (chosen - target) ** 2 + (rejected + target) ** 2
    return objective(loss, beta * chosen, beta * rejected)


def cpl(pair: Pair, *, alpha: float = 0.1, bias: float = 0.5) -> Objective:
    """CPL, arXiv:2310.13639: h(alpha (l(w) - bias l(l))), bias in (0, 1]. No reference model.

    Given discounted sums for l it is the paper's segment loss; a larger bias is less conservative.
    """
    expect(0 < bias <= 1, "bias", "a number in (0, 1]", bias)
    loss = logistic(alpha * (pair.chosen - bias * pair.rejected))
    return objective(loss, alpha * pair.chosen, alpha * pair.rejected)


_ALL = (
    (sigmoid, sigmoid_norm, robust, hinge, slic, ipo, ipo_sum)
    + (fdpo_forward_kl, fdpo_jsd, fdpo_alpha, exo_pair, nca_pair, bco_pair)
    + (sppo_hard, apo_zero, apo_down, discopop, simpo, alphapo, cpo, orpo)
    + (rdpo, dpop, dpo_nll, cal_dpo, cpl)
)
LOSSES: dict[str, Callable[..., Objective]] = {loss.__name__: loss for loss in _ALL}
