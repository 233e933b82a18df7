// TD(lambda) returns and advantages over packed sequences; kernels/advantage.py has the formulas.
#pragma once
#include <cstdint>

namespace prefuse {

// `values`, `mask`, `bootstrap` and `advantages` may be null: zeros, all true, zeros, not wanted.
struct GaeArguments {
  const float* rewards;        // [tokens]
  const float* values;         // [tokens]
  const uint8_t* mask;         // [tokens], 0 at observations
  const float* bootstrap;      // [sequences]
  const int32_t* cu_seqlens;   // [sequences + 1]
  float* advantages;           // [tokens]
  float* returns;              // [tokens]
  int64_t tokens, sequences;
  float gamma, lam;
};

void gae_cpu(const GaeArguments& args, int threads);

#ifdef PREFUSE_CUDA
// 8-byte words of scratch that gae_cuda needs for that many tokens.
int64_t gae_cuda_scratch(int64_t tokens);
// Token arrays and scratch start on 16-byte boundaries.
void gae_cuda(const GaeArguments& args, void* scratch, void* stream);
#endif

}  // namespace prefuse
