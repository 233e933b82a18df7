#include "pack.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace prefuse {

int64_t pack_cpu(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* bin_of) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return lengths[i] > lengths[j]; });

  // A tree of maxima over the room left in every bin. Unopened bins are full of room, so the
  // leftmost bin that fits is first fit, and the next new bin when no opened one does.
  int64_t leaves = 1;
  while (leaves < n) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, capacity);
  int64_t bins = 0;
  for (int64_t item : order) {
    int64_t node = 1;
    while (node < leaves) node = 2 * node + (room[2 * node] < lengths[item]);
    bin_of[item] = node - leaves;
    bins = std::max(bins, node - leaves + 1);
    room[node] -= lengths[item];
    for (node /= 2; node > 0; node /= 2) room[node] = std::max(room[2 * node], room[2 * node + 1]);
  }
  return bins;
}

}  // namespace prefuse
