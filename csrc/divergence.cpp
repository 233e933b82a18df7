#include "divergence.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

#define INLINE static inline __attribute__((always_inline))

namespace prefuse {
namespace {

constexpr int64_t kChunk = 1024;  // columns held in L1 at a time
constexpr float kNear = 0.5f;     // a log-ratio below this takes the series
constexpr float kClose = 1.0f;    // up to here p_S is p_T e^r, so that their errors are one
constexpr float kFinite = 1e30f;

// phi(x) = exp(x) - 1 - x for |x| < kNear, without its cancellation.
INLINE float phi_near(float x) {
  float p = 2.4801587e-05f + x * 2.7557319e-06f;
  p = p * x + 1.9841270e-04f;
  p = p * x + 1.3888889e-03f;
  p = p * x + 8.3333333e-03f;
  p = p * x + 4.1666667e-02f;
  p = p * x + 1.6666667e-01f;
  p = p * x + 0.5f;
  return p * x * x;
}

// atanh(z) / z - 1 for |z| < 0.25.
INLINE float atanh_tail(float z) {
  const float s = z * z;
  float p = 1.0f / 11 + s * (1.0f / 13);
  p = p * s + 1.0f / 9;
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  return p * s;
}

// log(x) for x in (0, 2), not subnormal.
INLINE float log_approx(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // the mantissa in [1/sqrt 2, sqrt 2)
  bits -= exponent << 23;
  float m;
  std::memcpy(&m, &bits, 4);
  const float z = (m - 1.0f) / (m + 1.0f);
  return static_cast<float>(exponent) * 0.69314718056f + 2.0f * z * (1.0f + atanh_tail(z));
}

// One entry's share of the value, and of p_S f'(p_S / p_T), whose mean makes the gradient.
template <int KIND>
INLINE void terms(float x_s, float x_t, float lse_s, float lse_t, float offset, float weight,
                  float rest, float* value, float* slope) {
  const float r = (x_s - x_t) - offset;
  const float size = std::fabs(r);
  const bool close = size <= kClose;  // false for NaN: both logits are -inf
  const bool near = size < kNear;
  const float p_t = exp_approx(x_t - lse_t);
  const float e = exp_approx(close ? r : 0);
  const float apart = exp_approx(x_s - lse_s);
  const float p_s = close ? p_t * e : apart;
  if (KIND == kForwardKl) {
    const float phi = phi_near(r);
    const float far = p_t == 0 ? p_s : p_s - p_t - p_t * r;
    *value = near ? p_t * phi : far;
    *slope = near ? p_t * (r + phi) : p_s - p_t;
  } else if (KIND == kReverseKl) {
    const float far = p_s == 0 ? p_t : p_t - p_s + p_s * r;
    *value = near ? p_s * phi_near(-r) : far;
    *slope = p_s == 0 ? 0 : p_s * r;
  } else if (KIND == kJsd) {
    const float beta = weight;
    const float grown = r + phi_near(r);
    const float y_t = rest * grown, y_s = -beta * grown / (1 + grown);
    const float z_t = y_t / (2 + y_t), z_s = y_s / (2 + y_s);
    const float tail_t = atanh_tail(z_t), tail_s = atanh_tail(z_s);
    const float near_t = 2 * z_t * (z_t / (1 - z_t) - tail_t);  // y - log1p(y)
    const float near_s = 2 * z_s * (z_s / (1 - z_s) - tail_s);
    const float decay = exp_approx(-size);
    const float b = r > 0 ? beta : rest, a = r > 0 ? rest : beta;
    const float total = a + b * decay;
    const float lost = -b * (1 - decay) - (total - 1);
    const float log_total = log_approx(total) + (total > 0.5f ? lost / total : 0);
    const float u_t = r > 0 ? log_total + r : log_total;
    const float u_s = r > 0 ? log_total : log_total - r;
    const float far_t = p_t == 0 ? 0 : p_t * u_t, far_s = p_s == 0 ? 0 : p_s * u_s;
    *value = near ? beta * p_t * near_t + rest * p_s * near_s : -beta * far_t - rest * far_s;
    *slope = -rest * (near ? p_s * 2 * z_s * (1 + tail_s) : far_s);
  } else if (KIND == kAlpha) {
    const float alpha = weight;
    const bool by_teacher = alpha >= 0.5f;  // the smaller exponent, where no digits cancel
    const float s = by_teacher ? rest : alpha, x = by_teacher ? r : -r;
    const float p = by_teacher ? p_t : p_s, other = by_teacher ? p_s : p_t;
    const float scaled = s * x, y = -alpha * r;
    const float mixed_apart = exp_approx(rest * (x_s - lse_s) + alpha * (x_t - lse_t));
    const float mixed_close = p * exp_approx(close ? scaled : 0);
    const float mixed = close ? mixed_close : mixed_apart;
    const float whole = near ? p * phi_near(x) : other - p - p * x;
    const float part = std::fabs(scaled) < kNear ? p * phi_near(scaled) : mixed - p - p * scaled;
    const float disjoint = (rest * p_s + alpha * p_t) / (alpha * rest);
    *value = size < kFinite ? (whole - part / s) / (1 - s) : disjoint;
    *slope = (std::fabs(y) < kNear ? -p_s * (y + phi_near(y)) : p_s - mixed) / alpha;
  } else {
    const float gap = near ? p_t * (r + phi_near(r)) : p_s - p_t;
    *value = 0.5f * std::fabs(gap);
    *slope = (r > 0 ? 0.5f * p_s : 0) - (r < 0 ? 0.5f * p_s : 0);
  }
}

// Final logits of columns start .. start + n, and (if `slope`) d final / d raw.
INLINE void finals(const LogitSide& side, float inverse_temp, int64_t row, int64_t start,
                   int64_t n, float* x, float* slope) {
  const float* raw = side.raw + row * side.stride + start;
  const float scale = side.scale;
  if (side.softcap == 0) {
    const float factor = scale * inverse_temp;
    if (side.bias)
      for (int64_t j = 0; j < n; ++j) x[j] = (raw[j] + side.bias[start + j]) * factor;
    else
      for (int64_t j = 0; j < n; ++j) x[j] = raw[j] * factor;
    for (int64_t j = 0; slope && j < n; ++j) slope[j] = factor;
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    const float z = (raw[j] + (side.bias ? side.bias[start + j] : 0)) * scale;
    const float t = std::tanh(z / side.softcap);
    x[j] = t * side.softcap * inverse_temp;
    if (slope) slope[j] = (1 - t * t) * scale * inverse_temp;
  }
}

struct LogSum {
  float max = -3e38f;  // finite: exp(-inf - max) is 0 for a row that starts with -inf
  double sum = 0;

  INLINE void add(LogSum* total, const float* x, int64_t n) {
    float highest = total->max;
#pragma omp simd reduction(max : highest)
    for (int64_t j = 0; j < n; ++j) highest = x[j] > highest ? x[j] : highest;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += exp_approx(x[j] - highest);
    total->sum = total->sum * std::exp(static_cast<double>(total->max) - highest) + sum;
    total->max = highest;
  }
};

template <int KIND>
PREFUSE_CLONES void statistics_row(const DivergenceTile& tile, int64_t row, float* stats) {
  float x_s[kChunk], x_t[kChunk];
  const float inverse_temp = tile.inverse_temp[row];
  LogSum student, teacher;
  for (int64_t start = 0; start < tile.cols; start += kChunk) {
    const int64_t n = std::min(kChunk, tile.cols - start);
    finals(tile.student, inverse_temp, row, start, n, x_s, nullptr);
    finals(tile.teacher, inverse_temp, row, start, n, x_t, nullptr);
    LogSum::add(&student, x_s, n);
    LogSum::add(&teacher, x_t, n);
  }
  const float lse_s = static_cast<float>(student.max + std::log(student.sum));
  const float lse_t = static_cast<float>(teacher.max + std::log(teacher.sum));
  const float offset = static_cast<float>((static_cast<double>(student.max) - teacher.max) +
                                          std::log(student.sum / teacher.sum));
  const float weight = static_cast<float>(tile.weight);
  const float rest = static_cast<float>(1 - tile.weight);
  double value = 0, mean = 0;
  for (int64_t start = 0; start < tile.cols; start += kChunk) {
    const int64_t n = std::min(kChunk, tile.cols - start);
    finals(tile.student, inverse_temp, row, start, n, x_s, nullptr);
    finals(tile.teacher, inverse_temp, row, start, n, x_t, nullptr);
    float chunk_value = 0, chunk_mean = 0;
#pragma omp simd reduction(+ : chunk_value, chunk_mean)
    for (int64_t j = 0; j < n; ++j) {
      float v, w;
      terms<KIND>(x_s[j], x_t[j], lse_s, lse_t, offset, weight, rest, &v, &w);
      chunk_value += v;
      chunk_mean += w;
    }
    value += chunk_value;
    mean += chunk_mean;
  }
  const float parts[kDivergenceParts] = {lse_s, lse_t, offset, static_cast<float>(value),
                                         static_cast<float>(mean)};
  for (int k = 0; k < kDivergenceParts; ++k) stats[k * tile.rows + row] = parts[k];
}

template <int KIND>
PREFUSE_CLONES void gradient_row(const DivergenceTile& tile, int64_t row, const float* stats,
                                 float* out) {
  float x_s[kChunk], x_t[kChunk], slope[kChunk];
  const float inverse_temp = tile.inverse_temp[row];
  const float weight = static_cast<float>(tile.weight);
  const float rest = static_cast<float>(1 - tile.weight);
  const float lse_s = stats[row], lse_t = stats[tile.rows + row];
  const float offset = stats[2 * tile.rows + row], mean = stats[4 * tile.rows + row];
  for (int64_t start = 0; start < tile.cols; start += kChunk) {
    const int64_t n = std::min(kChunk, tile.cols - start);
    finals(tile.student, inverse_temp, row, start, n, x_s, slope);
    finals(tile.teacher, inverse_temp, row, start, n, x_t, nullptr);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
      float v, w;
      terms<KIND>(x_s[j], x_t[j], lse_s, lse_t, offset, weight, rest, &v, &w);
      x_s[j] = (w - mean * exp_approx(x_s[j] - lse_s)) * slope[j];
    }
    std::copy(x_s, x_s + n, out + start);
  }
}

}  // namespace

void divergence_statistics_cpu(const DivergenceTile& tile, float* stats, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) {
    if (tile.kind == kForwardKl) statistics_row<kForwardKl>(tile, row, stats);
    if (tile.kind == kReverseKl) statistics_row<kReverseKl>(tile, row, stats);
    if (tile.kind == kJsd) statistics_row<kJsd>(tile, row, stats);
    if (tile.kind == kAlpha) statistics_row<kAlpha>(tile, row, stats);
    if (tile.kind == kTvd) statistics_row<kTvd>(tile, row, stats);
  }
}

void divergence_gradient_cpu(const DivergenceTile& tile, const float* stats, float* out,
                             int64_t out_stride, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < tile.rows; ++row) {
    float* target = out + row * out_stride;
    if (tile.kind == kForwardKl) gradient_row<kForwardKl>(tile, row, stats, target);
    if (tile.kind == kReverseKl) gradient_row<kReverseKl>(tile, row, stats, target);
    if (tile.kind == kJsd) gradient_row<kJsd>(tile, row, stats, target);
    if (tile.kind == kAlpha) gradient_row<kAlpha>(tile, row, stats, target);
    if (tile.kind == kTvd) gradient_row<kTvd>(tile, row, stats, target);
  }
}

}  // namespace prefuse
