// Divergences between two rows of logits; the formulas are those of kernels/divergence_pass.py.
#pragma once
#include <cstdint>

namespace prefuse {

enum DivergenceKind { kForwardKl = 0, kReverseKl = 1, kJsd = 2, kAlpha = 3, kTvd = 4 };
constexpr int kDivergenceParts = 5;  // lse_student, lse_teacher, offset, value, mean

// One head's raw logits [rows][cols]; final logit = softcap(scale * (raw + bias)) / temperature.
struct LogitSide {
  const float* raw;
  int64_t stride;
  const float* bias;  // 0: none
  float scale, softcap;  // softcap 0: none
};

struct DivergenceTile {
  LogitSide student, teacher;
  int64_t rows, cols;
  const float* inverse_temp;  // [rows]
  int kind;
  double weight;  // beta of the mixture, or alpha
};

// stats is [kDivergenceParts][rows]. `out` may be the student's raw logits.
void divergence_statistics_cpu(const DivergenceTile& tile, float* stats, int threads);
void divergence_gradient_cpu(const DivergenceTile& tile, const float* stats, float* out,
                             int64_t out_stride, int threads);

}  // namespace prefuse
