#include "advantage.h"

#include <algorithm>
#include <vector>

namespace prefuse {
namespace {

// `carried` is what an action sees after itself: later rewards at observations, then
// gamma * ((1 - lam) * V + lam * return) of the next action, or gamma * bootstrap at the end.
// Pairs are indexed by `acts`: real masks are too irregular for a branch to be predicted.
struct Scan {
  double slopes[2], keep, carried;

  Scan(double gamma, double lam, double at_end)
      : slopes{1.0, gamma * lam}, keep(gamma - gamma * lam), carried(at_end) {}

  // The return of a token, which is passed on.
  double take(bool acts, double reward, double value) {
    const double total = reward + carried;
    // One multiply-add from the last `carried` to this one: the loop's only dependence.
    const double offsets[2] = {reward, slopes[1] * reward + keep * value};
    carried = slopes[acts] * carried + offsets[acts];
    return total;
  }
};

// `sums` gets count, sum and sum of squares of the advantages.
template <bool kHasValues, bool kHasMask, bool kPlain>
void scan_sequence(const GaeArguments& args, int64_t s, double* sums) {
  const double at_end = args.bootstrap ? double{args.gamma} * args.bootstrap[s] : 0.0;
  Scan actor(args.gamma, args.lams ? args.lams[s] : args.lam, at_end);
  Scan critic(args.gamma, args.critic_lams ? args.critic_lams[s] : args.critic_lam, at_end);
  const bool two = args.two_lambdas();
  const double kl_coef = args.kl_coef;
  double count = 0, sum = 0, squares = 0;
  for (int64_t t = args.cu_seqlens[s + 1] - 1; t >= args.cu_seqlens[s]; --t) {
    const bool acts = !kHasMask || args.mask[t];
    double reward = args.rewards[t];
    const double value = kHasValues ? args.values[t] : 0.0f;
    if (!kPlain && args.logp) {
      const double penalties[2] = {0.0, kl_coef * (double{args.logp[t]} - args.ref_logp[t])};
      reward -= penalties[acts];
    }
    const double total = actor.take(acts, reward, value);
    const double target = !kPlain && two ? critic.take(acts, reward, value) : total;
    const float returns[2] = {0.0f, static_cast<float>(target)};
    args.returns[t] = returns[acts];
    const float advantages[2] = {0.0f, static_cast<float>(total - value)};
    if (kHasValues) args.advantages[t] = advantages[acts];
    if (!kPlain) {
      const double advantage = advantages[acts];
      count += acts, sum += advantage, squares += advantage * advantage;
    }
  }
  if (!kPlain) sums[0] = count, sums[1] = sum, sums[2] = squares;
}

}  // namespace

void gae_cpu(const GaeArguments& args, int threads) {
  const auto shaped = args.mask ? scan_sequence<true, true, false>
                                : scan_sequence<true, false, false>;
  const auto with_values = args.mask ? scan_sequence<true, true, true>
                                     : scan_sequence<true, false, true>;
  const auto without = args.mask ? scan_sequence<false, true, true>
                                 : scan_sequence<false, false, true>;
  const auto scan = !args.plain() ? shaped : args.values ? with_values : without;
  std::vector<double> sums(args.plain() ? 0 : 3 * args.sequences);
  // Waking a thread is worth it for about this many tokens.
  threads = static_cast<int>(std::min({int64_t{threads}, args.sequences, 1 + args.tokens / 32768}));
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t s = 0; s < args.sequences; ++s)
    scan(args, s, args.plain() ? nullptr : sums.data() + 3 * s);
  if (!args.statistics) return;
  double total[3] = {};  // in the sequences' order: the same bits, whatever the threads
  for (size_t i = 0; i < sums.size(); ++i) total[i % 3] += sums[i];
  std::copy(total, total + 3, args.statistics);
}

}  // namespace prefuse
