#include "token_stats.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace prefuse {
namespace {

constexpr int64_t kChunk = 1024;  // columns held in L1 at a time

inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return bf16_to_float(x); }
inline void from_float(float v, float* out) { *out = v; }
inline void from_float(float v, uint16_t* out) { *out = float_to_bf16(v); }

// distance[j] = (final logit j - anchor) / temperature; cap[j] = 1 - tanh^2 under a softcap.
template <typename T>
inline __attribute__((always_inline)) void distances(const Block& b, const T* logits, int64_t row,
                                                     int64_t start, int64_t n, float* distance,
                                                     float* cap) {
  const float inverse_temp = b.inverse_temp[row], anchor = b.anchor[row];
  const float scale = b.logit_scale;
  if (!b.bias && b.softcap == 0) {
    for (int64_t j = 0; j < n; ++j)
      distance[j] = (to_float(logits[start + j]) * scale - anchor) * inverse_temp;
    return;
  }
  for (int64_t j = 0; j < n; ++j)
    distance[j] = (to_float(logits[start + j]) + (b.bias ? b.bias[start + j] : 0)) * scale;
  for (int64_t j = 0; b.softcap > 0 && j < n; ++j) {
    const float t = std::tanh(distance[j] / b.softcap);
    cap[j] = 1 - t * t;
    distance[j] = t * b.softcap;
  }
  for (int64_t j = 0; j < n; ++j) distance[j] = (distance[j] - anchor) * inverse_temp;
}

template <typename T>
PREFUSE_CLONES void forward_row(const Block& b, int64_t row, float* parts, bool store) {
  T* logits = static_cast<T*>(b.logits) + row * b.row_stride;
  const int64_t target = b.targets[row] - b.first_col;
  float distance[kChunk], cap[kChunk];
  float sum_e = 0, shift = 0, sum_ed = 0, sum_d = 0, sum_ee = 0, max_d = kExcluded;
  float chunk_shift[1024];  // one per chunk of a stored tile: enough for a million columns
  const int64_t n_chunks = (b.n_cols + kChunk - 1) / kChunk;
  for (int64_t c = 0; c < n_chunks; ++c) {
    const int64_t start = c * kChunk, n = std::min(kChunk, b.n_cols - start);
    distances(b, logits, row, start, n, distance, cap);
    if (target >= start && target < start + n) {
      sum_d -= distance[target - start];
      distance[target - start] = kExcluded;
      sum_d -= kExcluded;
      if (b.softcap > 0) cap[target - start] = 0;
    }
    float chunk_max = kExcluded, chunk_sum = 0;
#pragma omp simd reduction(max : chunk_max) reduction(+ : chunk_sum)
    for (int64_t j = 0; j < n; ++j) {
      chunk_max = distance[j] > chunk_max ? distance[j] : chunk_max;
      chunk_sum += distance[j];
    }
    sum_d += chunk_sum;
    max_d = std::max(max_d, chunk_max);
    if (chunk_max - shift > kMaxExponent) {
      const float raise = chunk_max - shift, w = std::exp(-raise);
      sum_ed = w * (sum_ed - raise * sum_e);
      sum_e *= w;
      sum_ee *= w * w;
      shift = chunk_max;
    }
    if (store) chunk_shift[c] = shift;
    float e_sum = 0, ed_sum = 0, ee_sum = 0;
#pragma omp simd reduction(+ : e_sum, ed_sum, ee_sum)
    for (int64_t j = 0; j < n; ++j) {
      const float d = std::max(distance[j] - shift, kExcluded), e = exp_approx(d);
      e_sum += e;
      ed_sum += e * d;
      ee_sum += e * e;
      distance[j] = e;
    }
    sum_e += e_sum;
    sum_ed += ed_sum;
    sum_ee += ee_sum;
    if (store) {
      if (b.softcap > 0)
        for (int64_t j = 0; j < n; ++j) distance[j] *= cap[j];
      for (int64_t j = 0; j < n; ++j) from_float(distance[j], logits + start + j);
      if (target >= start && target < start + n) from_float(0, logits + target);
    }
  }
  if (store && shift > 0)  // chunks before the anchor was raised
    for (int64_t c = 0; c < n_chunks; ++c) {
      const float w = std::exp(chunk_shift[c] - shift);
      const int64_t end = std::min((c + 1) * kChunk, b.n_cols);
      if (w != 1)
        for (int64_t j = c * kChunk; j < end; ++j) from_float(to_float(logits[j]) * w, logits + j);
    }
  const float values[kParts] = {sum_e, shift, sum_ed, sum_d, sum_ee, max_d};
  for (int k = 0; k < kParts; ++k) parts[k * b.n_rows + row] = values[k];
}

template <typename T>
PREFUSE_CLONES void backward_row(const Block& b, int64_t row, float shift, float alpha, float beta,
                                 float gamma, T* out) {
  const T* logits = static_cast<const T*>(b.logits) + row * b.row_stride;
  out += row * b.row_stride;
  const int64_t target = b.targets[row] - b.first_col;
  const float factor = b.logit_scale * b.inverse_temp[row];
  float distance[kChunk], cap[kChunk];
  for (int64_t start = 0; start < b.n_cols; start += kChunk) {
    const int64_t n = std::min(kChunk, b.n_cols - start);
    const bool here = target >= start && target < start + n;
    distances(b, logits, row, start, n, distance, cap);
    for (int64_t j = 0; j < n; ++j) {
      const float d = std::max(distance[j] - shift, kExcluded);
      distance[j] = exp_approx(d) * (alpha + beta * d) * factor;
    }
    if (here) distance[target - start] = gamma * factor;
    if (b.softcap > 0)
      for (int64_t j = 0; j < n; ++j) distance[j] *= cap[j];
    for (int64_t j = 0; j < n; ++j) from_float(distance[j], out + start + j);
  }
}

}  // namespace

void fold_forward_cpu(const Block& b, Scalar dtype, float* parts, bool store, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (int64_t row = 0; row < b.n_rows; ++row)
    dtype == Scalar::f32 ? forward_row<float>(b, row, parts, store)
                         : forward_row<uint16_t>(b, row, parts, store);
}

void fold_backward_cpu(const Block& b, Scalar dtype, const float* shift, const float* alpha,
                       const float* beta, const float* gamma, void* out, int n_threads) {
  if (!out) out = b.logits;
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (int64_t row = 0; row < b.n_rows; ++row)
    dtype == Scalar::f32
        ? backward_row(b, row, shift[row], alpha[row], beta[row], gamma[row],
                       static_cast<float*>(out))
        : backward_row(b, row, shift[row], alpha[row], beta[row], gamma[row],
                       static_cast<uint16_t*>(out));
}

}  // namespace prefuse
