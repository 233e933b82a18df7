// The recursion as a reverse scan of affine maps, in one pass over flat chunks of the packed
// tokens, whatever the sequences' lengths. Chunks start last to first. Each publishes its own
// composite map at once, then composes the later chunks' maps, in order, up to the nearest that
// lets nothing through (a sequence ends in it): so the result is the same bits in every run.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "advantage.h"

namespace prefuse {
namespace {

constexpr int kLanes = 32, kWarps = 8, kThreads = kWarps * kLanes;
constexpr int kVector = 4;                  // tokens in one 16-byte access
constexpr int kTile = kLanes * kVector;     // tokens a warp reads in one access
constexpr int kTiles = 2;                   // tiles of a warp
constexpr int kWarpTokens = kTiles * kTile;
constexpr int kChunk = kWarps * kWarpTokens;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocksPerSm = 4;  // a fifth spills registers
#else
constexpr int kBlocksPerSm = 5;
#endif
constexpr int kShapedBlocksPerSm = 3;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr unsigned long long kUnpublished = ~0ull;  // a NaN slope, which no map has

// carried -> slope * carried + offset.
struct Affine {
  float slope, offset;
};

// `later` first, then `earlier`: time runs backward. Slope 0 lets nothing through, not even NaN.
__device__ __forceinline__ Affine compose(Affine earlier, Affine later) {
  if (earlier.slope == 0.0f) return earlier;
  return {earlier.slope * later.slope, fmaf(earlier.slope, later.offset, earlier.offset)};
}

__device__ __forceinline__ float apply(Affine map, float carried) {
  return map.slope == 0.0f ? map.offset : fmaf(map.slope, carried, map.offset);
}

__device__ __forceinline__ Affine from_lane(Affine map, int lane) {
  return {__shfl_sync(kAllLanes, map.slope, lane), __shfl_sync(kAllLanes, map.offset, lane)};
}

// Each lane gets the composite of itself and all later lanes.
__device__ __forceinline__ Affine scan_warp(Affine map, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const Affine later = {__shfl_down_sync(kAllLanes, map.slope, step),
                          __shfl_down_sync(kAllLanes, map.offset, step)};
    if (lane + step < kLanes) map = compose(map, later);
  }
  return map;
}

__device__ __forceinline__ unsigned long long pack(Affine map) {
  return static_cast<unsigned long long>(__float_as_uint(map.offset)) << 32 |
         __float_as_uint(map.slope);
}

__device__ __forceinline__ Affine unpack(unsigned long long word) {
  return {__uint_as_float(static_cast<unsigned>(word)),
          __uint_as_float(static_cast<unsigned>(word >> 32))};
}

// What is carried into `chunk` from the later ones; all lanes of one warp call it. A map and its
// ready mark are one 8-byte word, so no fence is needed.
__device__ float carried_into(int chunk, int chunks, const volatile unsigned long long* published,
                              int lane) {
  Affine seen = {1.0f, 0.0f};
  for (int first = chunk + 1; first < chunks && seen.slope != 0.0f; first += kLanes) {
    Affine map = {0.0f, 0.0f};  // beyond the last chunk there is nothing
    bool ready = first + lane >= chunks;
    unsigned needed;
    do {
      if (!ready) {
        const unsigned long long word = published[first + lane];
        ready = word != kUnpublished;
        if (ready) map = unpack(word);
      }
      const unsigned cuts = __ballot_sync(kAllLanes, ready && map.slope == 0.0f);
      needed = cuts ? cuts ^ (cuts - 1) : kAllLanes;  // the lanes up to the nearest cut
    } while ((__ballot_sync(kAllLanes, ready) & needed) != needed);
    seen = compose(seen, from_lane(scan_warp(map, lane), 0));
  }
  return seen.offset;
}

// Marks the tokens of this chunk that end a sequence, with what is carried into them.
__device__ void mark_ends(const GaeArguments& args, int chunk_begin, unsigned* ends, float* tails) {
  const int sequences = static_cast<int>(args.sequences);
  int low = 0, high = sequences;  // the first sequence that ends after chunk_begin
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (args.cu_seqlens[middle + 1] > chunk_begin) high = middle;
    else low = middle + 1;
  }
  for (int s = low + static_cast<int>(threadIdx.x); s < sequences; s += kThreads) {
    const int begin = args.cu_seqlens[s], end = args.cu_seqlens[s + 1];
    if (end - chunk_begin > kChunk) break;
    if (begin >= end || end <= chunk_begin) continue;
    const int last = end - 1 - chunk_begin;
    tails[last] = args.bootstrap ? args.gamma * args.bootstrap[s] : 0.0f;
    atomicOr(&ends[last / 32], 1u << (last % 32));
  }
}

template <bool kWhole>  // whether all tokens of the chunk exist
__device__ __forceinline__ void load(const float* from, int token, int tokens,
                                     float (&to)[kVector]) {
  if (kWhole || token + kVector <= tokens) {
    const float4 all = *reinterpret_cast<const float4*>(from + token);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = token + i < tokens ? from[token + i] : 0.0f;
  }
}

// The mask bytes of 4 tokens in one register.
template <bool kWhole>
__device__ __forceinline__ unsigned load(const uint8_t* mask, int token, int tokens) {
  if (kWhole || token + kVector <= tokens) return *reinterpret_cast<const unsigned*>(mask + token);
  unsigned bytes = 0;
#pragma unroll 1  // only the last tokens come here: spare the registers
  for (int i = 0; token + i < tokens; ++i) bytes |= static_cast<unsigned>(mask[token + i]) << 8 * i;
  return bytes;
}

__device__ __forceinline__ void store(float* to, int token, int tokens,
                                      const float (&from)[kVector]) {
  if (token + kVector <= tokens) {
    *reinterpret_cast<float4*>(to + token) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (token + i < tokens) to[token + i] = from[i];
  }
}

// What a lane knows of its tokens.
struct Tokens {
  float reward[kTiles][kVector], value[kTiles][kVector] = {};
  unsigned mask[kTiles];
};

// Rewards come out shaped. No load waits for another: all are on their way before one is used.
template <bool kHasValues, bool kShaped, bool kWhole>
__device__ __forceinline__ void read(const GaeArguments& args, int begin, int tokens, int local,
                                     Tokens& x) {
  float logp[kTiles][kVector], ref_logp[kTiles][kVector];
  const bool penalised = kShaped && args.logp;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int token = local + tile * kTile;
    load<kWhole>(args.rewards + begin, token, tokens, x.reward[tile]);
    if (kHasValues) load<kWhole>(args.values + begin, token, tokens, x.value[tile]);
    x.mask[tile] = args.mask ? load<kWhole>(args.mask + begin, token, tokens) : 0x01010101u;
    if (penalised) {
      load<kWhole>(args.logp + begin, token, tokens, logp[tile]);
      load<kWhole>(args.ref_logp + begin, token, tokens, ref_logp[tile]);
    }
  }
#pragma unroll
  for (int tile = 0; penalised && tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (x.mask[tile] >> 8 * i & 0xffu)
        x.reward[tile][i] -= args.kl_coef * (logp[tile][i] - ref_logp[tile][i]);
}

// The sequence of a token: the first that ends after it.
__device__ int sequence_of(const GaeArguments& args, int token) {
  int low = 0, high = static_cast<int>(args.sequences) - 1;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (args.cu_seqlens[middle + 1] > token) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Map 0 leads to the advantages, map 1 to the returns, which may have a lambda of their own.
template <int kMaps>
__device__ __forceinline__ float decay_of(const GaeArguments& args, int map, int sequence) {
  if (kMaps == 1) return args.gamma * args.lam;
  const float* lams = map ? args.critic_lams : args.lams;
  return args.gamma * (lams ? lams[sequence] : map ? args.critic_lam : args.lam);
}

// Adds up `own` over the block, for thread 0, always in the same order.
__device__ __forceinline__ void add_up_block(double (&own)[3], double (*warp_sums)[3]) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2)
      own[k] += __shfl_down_sync(kAllLanes, own[k], step);
    if (lane == 0) warp_sums[warp][k] = own[k];
  }
  __syncthreads();
  if (thread != 0) return;
  for (int i = 3; i < 3 * kWarps; ++i) own[i % 3] += warp_sums[i / 3][i % 3];
}

// Adds up `own` over all blocks: the last block to come here adds the parts of all, in an order
// that is the same in every run. `arrived` starts at ~0.
__device__ void add_up(double (&own)[3], int chunk, int chunks, double* parts, unsigned* arrived,
                       double* statistics) {
  __shared__ double warp_sums[kWarps][3];
  __shared__ bool is_last;
  const int thread = static_cast<int>(threadIdx.x);
  add_up_block(own, warp_sums);
  if (thread == 0) {
    for (int k = 0; k < 3; ++k) parts[3 * chunk + k] = own[k];
    __threadfence();
    is_last = atomicAdd(arrived, 1u) + 1u == static_cast<unsigned>(chunks - 1);
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  const volatile double* all = parts;
  for (int k = 0; k < 3; ++k) own[k] = 0;
#pragma unroll 4  // nothing else runs by now: what counts is how many loads are on their way
  for (int other = thread; other < chunks; other += kThreads)
    for (int k = 0; k < 3; ++k) own[k] += all[3 * other + k];
  add_up_block(own, warp_sums);
  if (thread == 0)
    for (int k = 0; k < 3; ++k) statistics[k] = own[k];
}

// What lies in `scratch`, in 8-byte words; the first `marked` must be all ones.
struct Scratch {
  unsigned long long* published;  // [maps][chunks]
  unsigned* tickets;              // [2]: of the chunks that start, and that have added up
  double* parts;                  // [chunks][3]
  int64_t marked;

  Scratch(void* scratch, int maps, int64_t chunks)
      : published(static_cast<unsigned long long*>(scratch)),
        tickets(reinterpret_cast<unsigned*>(published + maps * chunks)),
        parts(reinterpret_cast<double*>(published + maps * chunks + 1)),
        marked(maps * chunks + 1) {}
};

// kShaped: with a KL penalty and statistics, if their pointers are set; kMaps = 2: with lambdas of
// each sequence, or of the critic.
template <bool kHasValues, int kMaps, bool kShaped>
__global__ void __launch_bounds__(kThreads, kShaped ? kShapedBlocksPerSm : kBlocksPerSm)
    gae_kernel(GaeArguments args, int chunks, Scratch scratch) {
  __shared__ unsigned ends[kChunk / 32];
  __shared__ float tails[kChunk];
  __shared__ Affine warp_maps[kMaps][kWarps];
  __shared__ float chunk_carried[kMaps];
  __shared__ int chunk_index;

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  // Tickets make sure that the chunks this one waits for have already started. The counter was
  // set to all ones, so the first ticket is 0.
  if (thread == 0) chunk_index = chunks - 1 - static_cast<int>(atomicAdd(scratch.tickets, 1u) + 1u);
  if (thread < kChunk / 32) ends[thread] = 0;
  __syncthreads();
  const int chunk = chunk_index, chunk_begin = chunk * kChunk;
  const int tokens = static_cast<int>(args.tokens) - chunk_begin;  // from here to the last
  const int own = warp * kWarpTokens + lane * kVector;  // this lane's first
  Tokens x;
  if (tokens >= kChunk)
    read<kHasValues, kShaped, true>(args, chunk_begin, tokens, own, x);
  else
    read<kHasValues, kShaped, false>(args, chunk_begin, tokens, own, x);
  int sequence[kTiles] = {};  // of the last of this lane's tokens
#pragma unroll
  for (int tile = 0; kMaps > 1 && tile < kTiles; ++tile)
    sequence[tile] = sequence_of(args, chunk_begin + own + tile * kTile + kVector - 1);
  mark_ends(args, chunk_begin, ends, tails);
  __syncthreads();

  // Composite maps: of this lane's tokens, of the later lanes in the tile, of tile, warp, chunk.
  Affine later_lanes[kMaps][kTiles], tile_map[kMaps][kTiles], warp_map[kMaps], later_warps[kMaps];
#pragma unroll
  for (int m = 0; m < kMaps; ++m) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int local = own + tile * kTile;
      const unsigned ended = ends[local / 32] >> (local % 32);
      int s = sequence[tile];
      Affine map = {1.0f, 0.0f};
#pragma unroll
      for (int i = kVector - 1; i >= 0; --i) {
        if (kMaps > 1)
          while (args.cu_seqlens[s] > chunk_begin + local + i) --s;
        const float decay = decay_of<kMaps>(args, m, s), keep = args.gamma - decay;
        if (ended >> i & 1u) map = {0.0f, tails[local + i]};
        const float r = x.reward[tile][i];
        const bool acts = x.mask[tile] >> 8 * i & 0xffu;
        const float offset = acts ? fmaf(decay, r, keep * x.value[tile][i]) : r;
        map = compose({acts ? decay : 1.0f, offset}, map);
      }
      map = scan_warp(map, lane);
      tile_map[m][tile] = from_lane(map, 0);
      const Affine next_lane = from_lane(map, (lane + 1) % kLanes);
      later_lanes[m][tile] = lane == kLanes - 1 ? Affine{1.0f, 0.0f} : next_lane;
    }
    warp_map[m] = tile_map[m][0];
#pragma unroll
    for (int tile = 1; tile < kTiles; ++tile) warp_map[m] = compose(warp_map[m], tile_map[m][tile]);
    if (lane == 0) warp_maps[m][warp] = warp_map[m];
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kMaps; ++m) {
    later_warps[m] = {1.0f, 0.0f};
    for (int other = warp + 1; other < kWarps; ++other)
      later_warps[m] = compose(later_warps[m], warp_maps[m][other]);
  }

  if (warp == 0) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m)
      if (lane == 0)
        atomicExch(&scratch.published[m * chunks + chunk],
                   pack(compose(warp_map[m], later_warps[m])));
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      const float carried = carried_into(chunk, chunks, scratch.published + m * chunks, lane);
      if (lane == 0) chunk_carried[m] = carried;
    }
  }
  __syncthreads();

  float carried[kMaps];
  double sums[3] = {};
#pragma unroll
  for (int m = 0; m < kMaps; ++m) carried[m] = apply(later_warps[m], chunk_carried[m]);
#pragma unroll
  for (int tile = kTiles - 1; tile >= 0; --tile) {
    const int local = own + tile * kTile;
    const unsigned ended = ends[local / 32] >> (local % 32);
    float advantage[kVector], total[kVector];
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      float inside = apply(later_lanes[m][tile], carried[m]);
      int s = sequence[tile];
#pragma unroll
      for (int i = kVector - 1; i >= 0; --i) {
        if (kMaps > 1)
          while (args.cu_seqlens[s] > chunk_begin + local + i) --s;
        const float decay = decay_of<kMaps>(args, m, s), keep = args.gamma - decay;
        if (ended >> i & 1u) inside = tails[local + i];
        const float sum = x.reward[tile][i] + inside;
        const bool acts = x.mask[tile] >> 8 * i & 0xffu;
        inside = acts ? fmaf(decay, sum, keep * x.value[tile][i]) : sum;
        if (m == 0) advantage[i] = acts ? sum - x.value[tile][i] : 0.0f;
        if (m == kMaps - 1) total[i] = acts ? sum : 0.0f;
        if (kShaped && m == 0 && acts && local + i < tokens) {
          sums[0] += 1.0;
          sums[1] += advantage[i];
          sums[2] += static_cast<double>(advantage[i]) * advantage[i];
        }
      }
      carried[m] = apply(tile_map[m][tile], carried[m]);
    }
    store(args.returns + chunk_begin, local, tokens, total);
    if (kHasValues) store(args.advantages + chunk_begin, local, tokens, advantage);
  }
  if (kShaped && args.statistics)
    add_up(sums, chunk, chunks, scratch.parts, scratch.tickets + 1, args.statistics);
}

int64_t count_chunks(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("gae_cuda: ") + cudaGetErrorString(error));
}

}  // namespace

int64_t gae_cuda_scratch(int64_t tokens) { return 5 * count_chunks(tokens) + 1; }

void gae_cuda(const GaeArguments& args, void* scratch, void* stream) {
  const int64_t chunks = count_chunks(args.tokens);
  const auto on = static_cast<cudaStream_t>(stream);
  const bool two = args.two_lambdas();
  const Scratch parts(scratch, two ? 2 : 1, chunks);
  check(cudaMemsetAsync(scratch, 0xff, parts.marked * 8, on));
  const auto shaped = two ? gae_kernel<true, 2, true> : gae_kernel<true, 1, true>;
  const auto plain = args.values ? gae_kernel<true, 1, false> : gae_kernel<false, 1, false>;
  const auto kernel = args.plain() ? plain : shaped;
  kernel<<<static_cast<unsigned>(chunks), kThreads, 0, on>>>(args, static_cast<int>(chunks), parts);
  check(cudaGetLastError());
}

}  // namespace prefuse
