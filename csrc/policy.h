// The token loss of a policy-gradient method with its derivative, in one pass; see
// kernels/surrogate.py.
#pragma once
#include <cstdint>

namespace prefuse {

enum PolicyRule { kClip = 0, kDetachedClip = 1, kSoft = 2 };
enum KlKind { kNone = 0, kK1 = 1, kK2 = 2, kK3 = 3, kRatioK3 = 4 };
constexpr int kPolicyBlock = 1024;  // tokens that share a row of `sums`
constexpr int kPolicySums = 6;      // tokens, clipped low and high, KL to old, KL to ref, loss

// Arrays are [tokens]; an address of 0 stands for what the comment says.
struct PolicyArguments {
  const float* logp;
  const float* old_logp;    // or 0, if log_ratio is given
  const float* log_ratio;   // 0: logp - old_logp
  const float* advantages;
  const uint8_t* mask;      // 0: all true
  const float* weight;      // 0: all 1
  const float* ref_logp;    // read if kl is not kNone
  float* loss;
  float* d_logp;            // 0: no gradient is wanted
  float* d_ratio;           // 0: added to d_logp
  float* sums;              // [ceil(tokens / kPolicyBlock)][kPolicySums]
  int64_t tokens;
  int rule;
  float low, high, cap;
  int kl;
  float kl_coef;
};

void policy_cpu(const PolicyArguments& args, int threads);

}  // namespace prefuse
