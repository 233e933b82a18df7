#include "policy.h"

#include <algorithm>

#include "simd.h"

namespace prefuse {
namespace {

constexpr float kLargestExponent = 80.0f;

// e - 1 for e = exp(x), without the cancellation near x = 0.
inline __attribute__((always_inline)) float less_1(float x, float e) {
  float p = 1.0f / 40320.0f;
  p = p * x + 1.0f / 5040.0f;
  p = p * x + 1.0f / 720.0f;
  p = p * x + 1.0f / 120.0f;
  p = p * x + 1.0f / 24.0f;
  p = p * x + 1.0f / 6.0f;
  p = p * x + 0.5f;
  const float series = p * x * x + x;
  return __builtin_fabsf(x) < 0.5f ? series : e - 1.0f;
}

// A block's inputs with the absent ones filled in, so that the arithmetic has no branch on them.
struct Staged {
  float logp[kPolicyBlock], ratio[kPolicyBlock], advantage[kPolicyBlock], weight[kPolicyBlock],
      k[kPolicyBlock], mask[kPolicyBlock];
};

struct Evaluated {
  float loss[kPolicyBlock], by_ratio[kPolicyBlock], by_logp[kPolicyBlock];
  float counters[kPolicySums - 1][kPolicyBlock];
};

// Masked tokens become zeros before anything is computed: what stands there may be NaN.
PREFUSE_CLONES void stage(const PolicyArguments& a, int64_t first, int n, Staged& s) {
  for (int i = 0; i < n; ++i) s.mask[i] = a.mask ? (a.mask[first + i] ? 1.0f : 0.0f) : 1.0f;
  const auto held = [&](const float* x, int i) { return s.mask[i] != 0.0f ? x[first + i] : 0.0f; };
  for (int i = 0; i < n; ++i) s.logp[i] = held(a.logp, i);
  for (int i = 0; i < n; ++i) s.advantage[i] = held(a.advantages, i);
  if (a.log_ratio)
    for (int i = 0; i < n; ++i) s.ratio[i] = held(a.log_ratio, i);
  else
    for (int i = 0; i < n; ++i) s.ratio[i] = s.logp[i] - held(a.old_logp, i);
  if (a.weight)
    for (int i = 0; i < n; ++i) s.weight[i] = held(a.weight, i);
  else
    for (int i = 0; i < n; ++i) s.weight[i] = 1.0f;
  if (a.kl != kNone)
    for (int i = 0; i < n; ++i) s.k[i] = s.logp[i] - held(a.ref_logp, i);
}

template <int kRule, int kKl>
PREFUSE_CLONES void evaluate(const PolicyArguments& a, int n, const Staged& __restrict s,
                             Evaluated& __restrict out) {
  const float low = a.low, high = a.high, cap = a.cap, kl_coef = a.kl_coef;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float u = s.ratio[i], advantage = s.advantage[i], mask = s.mask[i];
    const float bounded = u < kLargestExponent ? u : kLargestExponent;
    const float ratio = exp_approx(bounded), ratio_1 = less_1(bounded, ratio);
    const float slope = u <= kLargestExponent ? ratio : 0.0f;  // of the ratio in u
    const float clipped = ratio < low ? low : (ratio > high ? high : ratio);
    float value, by_ratio = 0.0f, by_logp = 0.0f;
    if (kRule == kClip) {
      const float plain = (ratio < cap ? ratio : cap) * advantage, held = clipped * advantage;
      value = plain < held ? -plain : -held;
      const float by_plain = ratio <= cap ? slope : 0.0f, by_held = clipped == ratio ? slope : 0.0f;
      by_ratio = -advantage * (plain <= held ? by_plain : by_held);
    } else if (kRule == kDetachedClip) {
      by_logp = -clipped * advantage;
      value = by_logp * s.logp[i];
    } else {
      const float tau = advantage > 0.0f ? low : high;
      const float x = tau * ratio_1, tail = exp_approx(x > 0.0f ? -x : x);
      const float gate = (x > 0.0f ? 1.0f : tail) / (1.0f + tail);  // sigmoid(x)
      const float steep = tail / ((1.0f + tail) * (1.0f + tail));   // and its derivative
      value = -4.0f / tau * gate * advantage;
      by_ratio = -4.0f * steep * slope * advantage;
    }
    value *= s.weight[i];
    by_ratio *= s.weight[i];
    by_logp *= s.weight[i];
    float kl = 0.0f;
    if (kKl != kNone) {
      const float k = s.k[i];
      // for ratio_k3 the product with the ratio is what must not overflow
      const float risen = kKl == kRatioK3 && bounded > 0.0f ? bounded : 0.0f;
      const float largest = kLargestExponent - risen;
      const float back = -k < largest ? -k : largest, back_1 = less_1(back, exp_approx(back));
      const float k3 = back_1 + k, k3_slope = -k <= largest ? -back_1 : 1.0f;
      float kl_by_logp;
      if (kKl == kK1) {
        kl = k;
        kl_by_logp = 1.0f;
      } else if (kKl == kK2) {
        kl = 0.5f * k * k;
        kl_by_logp = k;
      } else if (kKl == kK3) {
        kl = k3;
        kl_by_logp = k3_slope;
      } else {
        kl = ratio * k3;
        kl_by_logp = ratio * k3_slope;
        by_ratio += kl_coef * slope * k3;
      }
      value += kl_coef * kl;
      by_logp += kl_coef * kl_by_logp;
    }
    out.loss[i] = value * mask;
    out.by_ratio[i] = by_ratio * mask;
    out.by_logp[i] = by_logp * mask;
    const float below = advantage < 0.0f ? mask : 0.0f, above = advantage > 0.0f ? mask : 0.0f;
    out.counters[0][i] = mask;
    out.counters[1][i] = kRule != kSoft && ratio < low ? below : 0.0f;
    out.counters[2][i] = kRule != kSoft && ratio > high ? above : 0.0f;
    out.counters[3][i] = mask * (ratio_1 - u);
    out.counters[4][i] = mask * kl;
  }
}

// Eight running sums, added in a fixed order: the same bits whatever the vector width.
PREFUSE_CLONES float block_sum(const float* x, int n) {
  double lanes[8] = {};
  int i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] += x[i + lane];
  double sum = 0;
  for (; i < n; ++i) sum += x[i];
  for (double lane : lanes) sum += lane;
  return static_cast<float>(sum);
}

template <int kRule, int kKl>
void blocks(const PolicyArguments& a, int threads) {
  const int64_t count = (a.tokens + kPolicyBlock - 1) / kPolicyBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < count; ++block) {
    Staged staged;
    Evaluated out;
    const int64_t first = block * kPolicyBlock;
    const int n = static_cast<int>(std::min<int64_t>(kPolicyBlock, a.tokens - first));
    stage(a, first, n, staged);
    evaluate<kRule, kKl>(a, n, staged, out);
    std::copy_n(out.loss, n, a.loss + first);
    float* sums = a.sums + block * kPolicySums;
    for (int i = 0; i < kPolicySums - 1; ++i) sums[i] = block_sum(out.counters[i], n);
    sums[kPolicySums - 1] = block_sum(out.loss, n);
    if (a.d_logp && a.d_ratio) {
      std::copy_n(out.by_ratio, n, a.d_ratio + first);
      std::copy_n(out.by_logp, n, a.d_logp + first);
    } else if (a.d_logp) {
      for (int i = 0; i < n; ++i) a.d_logp[first + i] = out.by_logp[i] + out.by_ratio[i];
    }
  }
}

template <int kRule>
void by_kl(const PolicyArguments& a, int threads) {
  switch (a.kl) {
    case kK1: return blocks<kRule, kK1>(a, threads);
    case kK2: return blocks<kRule, kK2>(a, threads);
    case kK3: return blocks<kRule, kK3>(a, threads);
    case kRatioK3: return blocks<kRule, kRatioK3>(a, threads);
    default: return blocks<kRule, kNone>(a, threads);
  }
}

}  // namespace

void policy_cpu(const PolicyArguments& args, int threads) {
  // Waking a thread is worth it for about this many tokens.
  threads = static_cast<int>(std::min<int64_t>(threads, 1 + args.tokens / 16384));
  switch (args.rule) {
    case kClip: return by_kl<kClip>(args, threads);
    case kDetachedClip: return by_kl<kDetachedClip>(args, threads);
    default: return by_kl<kSoft>(args, threads);
  }
}

}  // namespace prefuse
