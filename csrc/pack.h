// First-fit-decreasing packing of lengths into bins of one capacity.
#pragma once
#include <cstdint>

namespace prefuse {

// Writes the bin of each item and returns how many were opened. Lengths are in [0, capacity].
int64_t pack_cpu(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* bin_of);

}  // namespace prefuse
