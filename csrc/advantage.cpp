#include "advantage.h"

#include <algorithm>

namespace prefuse {
namespace {

// `carried` is what an action sees after itself: later rewards at observations, then
// gamma * ((1 - lam) * V + lam * return) of the next action, or gamma * bootstrap at the end.
template <bool kHasValues, bool kHasMask>
void scan_sequence(const GaeArguments& args, int64_t begin, int64_t end, double carried) {
  const double gamma = args.gamma, decay = gamma * args.lam, keep = gamma - decay;
  const double slopes[2] = {1.0, decay};
  for (int64_t t = end - 1; t >= begin; --t) {
    // Pairs indexed by `acts`: real masks are too irregular for a branch to be predicted.
    const bool acts = !kHasMask || args.mask[t];
    const double reward = args.rewards[t], value = kHasValues ? args.values[t] : 0.0f;
    const double total = reward + carried;
    // One multiply-add from the last `carried` to this one: the loop's only dependence.
    const double offsets[2] = {reward, decay * reward + keep * value};
    carried = slopes[acts] * carried + offsets[acts];
    const float returns[2] = {0.0f, static_cast<float>(total)};
    args.returns[t] = returns[acts];
    const float advantages[2] = {0.0f, static_cast<float>(total - value)};
    if (kHasValues) args.advantages[t] = advantages[acts];
  }
}

}  // namespace

void gae_cpu(const GaeArguments& args, int threads) {
  const auto with_values = args.mask ? scan_sequence<true, true> : scan_sequence<true, false>;
  const auto without = args.mask ? scan_sequence<false, true> : scan_sequence<false, false>;
  const auto scan = args.values ? with_values : without;
  // Waking a thread is worth it for about this many tokens.
  threads = static_cast<int>(std::min({int64_t{threads}, args.sequences, 1 + args.tokens / 32768}));
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t s = 0; s < args.sequences; ++s)
    scan(args, args.cu_seqlens[s], args.cu_seqlens[s + 1],
         args.bootstrap ? static_cast<double>(args.gamma) * args.bootstrap[s] : 0.0);
}

}  // namespace prefuse
