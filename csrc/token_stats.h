// Anchored softmax statistics of a block of logits; kernels/token_stats.py has the formulas.
#pragma once
#include <cstdint>

namespace prefuse {

// As in kernels/fold.py: a distance above kMaxExponent raises the row's anchor; the target's own
// entry reads kExcluded, whose exp is 0 in float32 and which is finite, so that 0 * d stays 0.
constexpr float kMaxExponent = 10.f, kExcluded = -200.f;

enum class Scalar : int { f32 = 0, bf16 = 1, f16 = 2 };

// A block of n_rows x n_cols logits; column j is vocabulary entry first_col + j.
struct Block {
  void* logits;
  int64_t n_rows, n_cols, row_stride, first_col;
  const int64_t* targets;    // [n_rows] vocabulary entry
  const float* anchor;       // [n_rows] final logit of the target
  const float* inverse_temp; // [n_rows]
  const float* bias;         // [n_cols] or null
  float logit_scale, softcap; // softcap 0: none
};

// Rows of the partial sums, each n_rows long.
enum Part { kSumE, kShift, kSumED, kSumD, kSumEE, kMaxD, kParts };
constexpr int kFewestParts = 2;  // what log-probs need

// Writes kParts rows of partial sums to `parts` [kParts, n_rows]. With `store`, overwrites the
// (float32) logits by E, or by E * (1 - tanh^2) under a softcap, and 0 at the target.
void fold_forward_cpu(const Block& block, Scalar dtype, float* parts, bool store, int n_threads);

// Writes d loss / d logits over the logits, or to `out` (same type and strides) if not null.
void fold_backward_cpu(const Block& block, Scalar dtype, const float* shift, const float* alpha,
                       const float* beta, const float* gamma, void* out, int n_threads);

#ifdef PREFUSE_CUDA
// `splits` programs share a row; parts is [splits, n_parts, n_rows], n_parts kParts or kFewestParts.
void fold_forward_cuda(const Block& block, Scalar dtype, float* parts, int n_parts, int splits,
                       void* stream);
void fold_backward_cuda(const Block& block, Scalar dtype, const float* shift, const float* alpha,
                        const float* beta, const float* gamma, void* out, void* stream);
#endif

}  // namespace prefuse
