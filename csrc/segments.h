// Sums over the segments of a packed tensor; segment s is [cu_seqlens[s], cu_seqlens[s+1]).
#pragma once
#include <cstdint>

namespace prefuse {

template <typename T>
void segment_sum_cpu(const T* x, const int32_t* cu_seqlens, int64_t segments, T* sums, int threads);

// x[s] at every item of segment s.
template <typename T>
void segment_spread_cpu(const T* x, const int32_t* cu_seqlens, int64_t segments, T* out,
                        int threads);

}  // namespace prefuse
