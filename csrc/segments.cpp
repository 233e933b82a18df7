#include "segments.h"

#include <algorithm>

namespace prefuse {

template <typename T>
void segment_sum_cpu(const T* x, const int32_t* cu_seqlens, int64_t segments, T* sums,
                     int threads) {
  constexpr int kLanes = 8;  // independent sums, added in a fixed order whatever the vector width
  // Waking a thread is worth it for about this many items.
  threads = static_cast<int>(
      std::min({int64_t{threads}, segments, 1 + cu_seqlens[segments] / int64_t{65536}}));
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t s = 0; s < segments; ++s) {
    int64_t i = cu_seqlens[s];
    const int64_t end = cu_seqlens[s + 1];
    double lanes[kLanes] = {};
    for (; i + kLanes <= end; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
    double sum = 0;
    for (; i < end; ++i) sum += x[i];
    for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
    sums[s] = static_cast<T>(sum);
  }
}

template <typename T>
void segment_spread_cpu(const T* x, const int32_t* cu_seqlens, int64_t segments, T* out,
                        int threads) {
  threads = static_cast<int>(
      std::min({int64_t{threads}, segments, 1 + cu_seqlens[segments] / int64_t{65536}}));
#pragma omp parallel for schedule(guided) num_threads(threads)
  for (int64_t s = 0; s < segments; ++s) std::fill(out + cu_seqlens[s], out + cu_seqlens[s + 1], x[s]);
}

template void segment_spread_cpu(const float*, const int32_t*, int64_t, float*, int);
template void segment_spread_cpu(const double*, const int32_t*, int64_t, double*, int);
template void segment_sum_cpu(const float*, const int32_t*, int64_t, float*, int);
template void segment_sum_cpu(const double*, const int32_t*, int64_t, double*, int);

}  // namespace prefuse
