// TD(lambda) returns and advantages over packed sequences; kernels/advantage.py has the formulas and
// kernels/advantage_scan.py the scan.
#pragma once
#include <cstdint>

namespace prefuse {

// All pointers but `rewards`, `cu_seqlens` and `returns` may be null: values of 0, all true, a
// bootstrap of 0, no penalty, the scalar for every sequence; advantages or statistics not wanted.
struct GaeArguments {
  const float* rewards;        // [tokens]
  const float* values;         // [tokens]
  const uint8_t* mask;         // [tokens], 0 at observations
  const float* bootstrap;      // [sequences]
  const int32_t* cu_seqlens;   // [sequences + 1]
  const float* logp;           // [tokens], with ref_logp: an action's reward loses
  const float* ref_logp;       // kl_coef * (logp - ref_logp)
  const float* lams;           // [sequences], of the advantages
  const float* critic_lams;    // [sequences], of the returns
  float* advantages;           // [tokens]
  float* returns;              // [tokens]
  double* statistics;          // [3]: count, sum and sum of squares of the actions' advantages
  int64_t tokens, sequences;
  float gamma, lam, critic_lam, kl_coef;

  // Whether advantages and returns need a scan each, and whether plain GAE is all that is asked.
  bool two_lambdas() const { return lams || critic_lams || lam != critic_lam; }
  bool plain() const { return !two_lambdas() && !logp && !statistics; }
};

void gae_cpu(const GaeArguments& args, int threads);

#ifdef PREFUSE_CUDA
// 8-byte words of scratch that gae_cuda needs for that many tokens.
int64_t gae_cuda_scratch(int64_t tokens);
// Token arrays and scratch start on 16-byte boundaries.
void gae_cuda(const GaeArguments& args, void* scratch, void* stream);
#endif

}  // namespace prefuse
