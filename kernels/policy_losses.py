"""Policy losses: one function each, of tokens with an advantage.

R = exp(u), u = log pi - log pi_old of a token; A its advantage; sg stops the gradient;
clip(R, A) = min(R A, clamp(R, 1 - epsilon, 1 + epsilon_high) A), epsilon_high = epsilon if None.
Means and sums are over the unmasked tokens of the token's sequence, or of its step where `steps`
are given: GSPO of turns is GSPO with steps.

A loss names a rule of surrogate.py, which computes it with the KL penalty in one pass, or brings a
rule of its own; and says how its authors average it. Add one here and name it in LOSSES, where it
becomes a `loss_type` of `policy_loss`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import expect
from .policy_parts import Actions, Surrogate
from .surrogate import LARGEST_EXPONENT, clip, detached_clip, exp_ratio, soft

INFINITE = float("inf")


def ppo(
    x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float = INFINITE
) -> Surrogate:
    """PPO, arXiv:1707.06347: -clip(R, A), and for A < 0 at most -delta A.

    delta is the c of dual-clip PPO, arXiv:1912.09729, where 3 is usual; it is TRL's `delta`.
    """
    low, high = _range(epsilon, epsilon_high)
    expect(delta > high, "delta", f"more than 1 + epsilon_high, {high}", delta)
    return Surrogate(clip, low, high, delta)


def grpo(
    x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float = INFINITE
) -> Surrogate:
    """GRPO, arXiv:2402.03300: -clip(R, A), averaged over each sequence first."""
    return ppo(x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)._replace(
        aggregation="seq-mean-token-mean"
    )


def dapo(
    x: Actions, *, epsilon: float = 0.2, epsilon_high: float = 0.28, delta: float = INFINITE
) -> Surrogate:
    """DAPO, arXiv:2503.14476: -clip(R, A) with a higher ceiling, averaged over all tokens."""
    return ppo(x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)


def dr_grpo(
    x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None, delta: float = INFINITE
) -> Surrogate:
    """Dr. GRPO, arXiv:2503.20783: -clip(R, A), summed over a sequence and divided by max_length."""
    return ppo(x, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)._replace(
        aggregation="seq-mean-token-sum-norm"
    )


def decoupled_ppo(
    x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None
) -> Surrogate:
    """Decoupled PPO, arXiv:2110.00641: -(pi_old / pi_rollout) clip(R, A).

    pi_rollout, which sampled, may be older than pi_old, which the clip stays close to.
    """
    low, high = _range(epsilon, epsilon_high)
    sampled = x.known(x.need("rollout_logp"))
    weight = exp_ratio(x.kept(x.old_logp - sampled)).detach()
    return Surrogate(clip, low, high, weight=weight, corrects_rollout=True)


def clip_cov(x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Surrogate:
    """Clip-Cov, arXiv:2505.22617: -clip(R, A), and 0 at `selected` tokens.

    policy_weights.py selects them, by their covariance of log pi and A.
    """
    low, high = _range(epsilon, epsilon_high)
    return Surrogate(clip, low, high, weight=(~x.need("selected")).to(x.logp.dtype))


def kl_cov(x: Actions, *, kl_coef: float = 1.0) -> Surrogate:
    """KL-Cov, arXiv:2505.22617: -R A, and + kl_coef |u| at `selected` tokens."""
    selected = x.need("selected")

    def rule(u: Tensor, logp: Tensor, advantages: Tensor, *_: float) -> Tensor:
        return -exp_ratio(u) * advantages + kl_coef * torch.where(selected, u.abs(), 0.0)

    return Surrogate(rule)


def gspo(x: Actions, *, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4) -> Surrogate:
    """GSPO, arXiv:2507.18071: -clip(s, A), s = exp(mean u). The range is that of a mean: narrow."""
    low, high = _range(epsilon, epsilon_high)
    return Surrogate(clip, low, high, log_ratio=x.mean(x.log_ratio()), aggregation=PER_SEQUENCE)


def gspo_token(
    x: Actions, *, epsilon: float = 3e-4, epsilon_high: float | None = 4e-4
) -> Surrogate:
    """GSPO-token, arXiv:2507.18071: -clip(s_t, A_t), s_t = sg(s) pi / sg(pi), s = exp(mean u).

    GSPO's values, with each token's gradient its own: for advantages that differ over tokens.
    """
    low, high = _range(epsilon, epsilon_high)
    straight = x.mean(x.log_ratio()).detach() + x.logp - x.logp.detach()
    return Surrogate(clip, low, high, log_ratio=straight, aggregation=PER_SEQUENCE)


def luspo(x: Actions, *, epsilon: float = 2e-3, epsilon_high: float | None = 2.5e-3) -> Surrogate:
    """LUSPO, arXiv:2602.05261: GSPO, each sequence times its length.

    The length is of the unmasked tokens, as in TRL; Liger 0.8.5 takes the padded width where the
    loss differs over tokens.
    """
    return gspo(x, epsilon=epsilon, epsilon_high=epsilon_high)._replace(
        aggregation="seq-mean-token-sum"
    )


def gmpo(x: Actions, *, epsilon: float = 0.4, epsilon_high: float | None = None) -> Surrogate:
    """GMPO, arXiv:2507.20673: -exp(mean v) A, v = min(u, epsilon_high) if A > 0, max(u, -epsilon).

    epsilon is in nats: a range of exp(-0.4) to exp(0.4) for R.
    """
    expect(epsilon > 0, "epsilon", "a positive number of nats", epsilon)
    high = epsilon if epsilon_high is None else epsilon_high
    u = x.log_ratio()
    held = torch.where(x.need("advantages") > 0, u.clamp(max=high), u.clamp(min=-epsilon))
    return Surrogate(clip, log_ratio=x.mean(held), aggregation=PER_SEQUENCE)


def cispo(x: Actions, *, epsilon: float | None = None, epsilon_high: float = 5.0) -> Surrogate:
    """CISPO, arXiv:2506.13585: -sg(min(R, epsilon_high)) A log pi; no less than 1 - epsilon.

    epsilon_high is the cap itself, not 1 + epsilon_high; 5 is from arXiv:2510.13786. The paper
    leaves the lower bound out, as epsilon=None does.
    """
    low = 0.0 if epsilon is None else 1 - epsilon
    expect(epsilon_high > low, "epsilon_high", f"more than {low}", epsilon_high)
    return Surrogate(detached_clip, low, epsilon_high)


def sapo(x: Actions, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Surrogate:
    """SAPO, arXiv:2511.20347: -4 / tau sigmoid(tau (R - 1)) A, tau_pos if A > 0 else tau_neg."""
    for name, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        expect(tau > 0, name, "a positive number", tau)
    return Surrogate(soft, tau_pos, tau_neg, aggregation=PER_SEQUENCE)


def vespo(
    x: Actions,
    *,
    k_pos: float = 2.0,
    lambda_pos: float = 3.0,
    k_neg: float = 3.0,
    lambda_neg: float = 2.0,
) -> Surrogate:
    """VESPO, arXiv:2602.10693: -sg(f) A log pi, f = w^k exp(lambda (1 - w)), w = exp(sum u).

    k_pos and lambda_pos where A >= 0. w is pi / pi_rollout where rollout_logp is given. TRL and
    Liger clamp each u to +-20 and sum u to -18.4 and 20, where f is 0 by then.
    """
    u = x.log_ratio()
    rollout_logp = x.optional("rollout_logp")
    if rollout_logp is not None:
        u = u + x.kept(x.old_logp - x.known(rollout_logp))
    log_w = x.sum(u).detach()
    good = x.need("advantages") >= 0
    k, rate = torch.where(good, k_pos, k_neg), torch.where(good, lambda_pos, lambda_neg)
    weight = (k * log_w - rate * torch.expm1(log_w.clamp(max=LARGEST_EXPONENT))).exp()
    return _reinforced(x, weight)._replace(corrects_rollout=True)


def reinforce(x: Actions) -> Surrogate:
    """REINFORCE, Williams 1992: -A log pi."""
    return Surrogate(detached_clip, 1.0, 1.0)


def importance(x: Actions) -> Surrogate:
    """Off-policy policy gradient: -R A, without a clip."""
    return Surrogate(clip)


def rloo(x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Surrogate:
    """RLOO, arXiv:2402.14740: -clip(exp(sum u), A): a whole sequence is one action, as in TRL."""
    low, high = _range(epsilon, epsilon_high)
    return Surrogate(clip, low, high, log_ratio=x.sum(x.log_ratio()), aggregation=PER_SEQUENCE)


def topr(x: Actions) -> Surrogate:
    """TOPR, arXiv:2503.14286: -A log pi, and for A < 0 -sg(min(exp(sum u), 1)) A log pi."""
    truncated = exp_ratio(x.sum(x.log_ratio()).clamp(max=0)).detach()
    return _reinforced(x, torch.where(x.need("advantages") >= 0, 1.0, truncated))


def nft(x: Actions, *, epsilon: float = 1.0, scale: str = "mean") -> Surrogate:
    """NFT, arXiv:2505.18116: -w log R if correct, else -w log max((1 - q R) / (1 - q), epsilon).

    q is pass_rate, per prompt; reward is 1 or 0. The maximum is straight through: its gradient is
    that of what it replaces. With w = 1 - q, scale="mean", the slopes at R = 1 are Dr. GRPO's
    advantages, with sqrt((1 - q) / q), "std", those of GRPO; "none" is 1. Groups with q = 0 or 1
    teach nothing and count 0. Defaults are those of the authors' code: at epsilon = 1 a wrong token
    that has become likelier is pushed down by its R, at a smaller one by more.
    """
    weights = {"std": lambda q: ((1 - q) / q).sqrt(), "mean": lambda q: 1 - q, "none": lambda q: 1}
    expect(scale in weights, "scale", f"one of {', '.join(weights)}", repr(scale))
    reward, q = x.need("reward"), x.need("pass_rate")
    mixed = (q > 0) & (q < 1)
    q = torch.where(mixed, q, 0.5)

    def rule(u: Tensor, logp: Tensor, advantages: Tensor, *_: float) -> Tensor:
        negative = (1 - q * exp_ratio(u)) / (1 - q)
        held = negative.clamp(min=epsilon).detach()
        wrong = -held.log() - (negative - negative.detach()) / held
        loss = weights[scale](q) * torch.where(reward > 0, -u, wrong)
        return torch.where(mixed, loss, 0.0)

    unread = torch.zeros_like(x.logp)
    return Surrogate(rule, aggregation="seq-mean-token-sum-norm", advantages=unread)


def luffy(
    x: Actions, *, epsilon: float = 0.2, epsilon_high: float | None = None, gamma: float = 0.1
) -> Surrogate:
    """LUFFY, arXiv:2504.14945: -clip(R, A), and -pi / (pi + gamma) A at `off_policy` tokens."""
    low, high = _range(epsilon, epsilon_high)
    expect(gamma > 0, "gamma", "a positive number", gamma)
    off_policy = x.need("off_policy")

    def rule(u: Tensor, logp: Tensor, advantages: Tensor, *bounds: float) -> Tensor:
        p = logp.exp()
        return torch.where(
            off_policy, -p / (p + gamma) * advantages, clip(u, logp, advantages, *bounds)
        )

    return Surrogate(rule, low, high)


def distill(x: Actions) -> Surrogate:
    """On-policy distillation, arXiv:2306.08543: -R sg(log pi_teacher - log pi).

    A token's part of the sampled reverse KL to a teacher, without what it does to later tokens, as
    TRL has it; advantages are not read.
    """
    return Surrogate(clip, advantages=(x.need("teacher_logp") - x.logp).detach())


def iw_opd(x: Actions, *, gamma: float = 0.5) -> Surrogate:
    """IW-OPD, arXiv:2606.22600: -w A log pi, A = sg(log pi_teacher - log pi_rollout).

    w = 1 + gamma (1 - sum_{s < t} |A_s| / sum_s |A_s|) over the sequence: tokens before the teacher
    and the student part count more. pi_rollout is pi_old where rollout_logp is not given.
    """
    expect(gamma >= 0, "gamma", "a number of at least 0", gamma)
    rollout_logp = x.optional("rollout_logp")
    sampled = x.old_logp if rollout_logp is None else x.known(rollout_logp)
    advantages = x.kept(x.need("teacher_logp") - sampled).detach()
    size = advantages.abs()
    total = x.sum(size)
    passed = torch.where(total > 0, x.before(size) / total, 0.0)
    weighted = (1 + gamma * (1 - passed)) * advantages
    return reinforce(x)._replace(advantages=weighted, corrects_rollout=True)


def dft(x: Actions) -> Surrogate:
    """Dynamic fine-tuning, arXiv:2508.05629: -sg(pi) log pi, on demonstrations."""
    return _reinforced(x, x.logp.detach().exp())._replace(advantages=torch.ones_like(x.logp))


def sft(x: Actions) -> Surrogate:
    """Negative log-likelihood: -log pi; on correct samples, rejection-sampling fine-tuning."""
    return reinforce(x)._replace(advantages=torch.ones_like(x.logp))


PER_SEQUENCE = "seq-mean-token-mean"


def _range(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The bounds of a ratio."""
    high = epsilon if epsilon_high is None else epsilon_high
    expect(0 <= epsilon <= 1, "epsilon", "a number in [0, 1]", epsilon)
    expect(high >= 0, "epsilon_high", "a number of at least 0", high)
    return 1 - epsilon, 1 + high


def _reinforced(x: Actions, weight: Tensor) -> Surrogate:
    """-sg(weight) A log pi."""
    return reinforce(x)._replace(weight=weight)


_ALL = (
    (ppo, grpo, dapo, dr_grpo, decoupled_ppo, clip_cov, kl_cov)
    + (gspo, gspo_token, luspo, gmpo, cispo, sapo, vespo)
    + (reinforce, importance, rloo, topr, nft, luffy, distill, iw_opd, dft, sft)
)
LOSSES: dict[str, Callable[..., Surrogate]] = {loss.__name__: loss for loss in _ALL}
