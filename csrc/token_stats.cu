#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "token_stats.h"

namespace prefuse {
namespace {

// Memory-bound only while a logit costs about a dozen instructions: 16 bytes are loaded at once,
// one comparison finds the target in them, and distances are in units of log 2, whose exp is one
// instruction.
constexpr int kThreads = 256, kLoads = 2;  // loads in flight per thread
constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

template <typename T>
constexpr int kPack = 16 / sizeof(T);

// The logits of 16 bytes, as float.
template <typename T>
struct Pack {
  float v[kPack<T>];
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half* out) { *out = __float2half(x); }

// `aligned`: the row begins at 16 bytes, so that its packs do; n of them are inside the row.
template <typename T>
__device__ inline Pack<T> load(const T* p, bool aligned, int n) {
  Pack<T> pack;
  if (aligned && n >= kPack<T>) {
    alignas(16) T raw[kPack<T>];
    *reinterpret_cast<int4*>(raw) = *reinterpret_cast<const int4*>(p);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.v[i] = widen(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) pack.v[i] = i < n ? widen(p[i]) : 0;
  }
  return pack;
}

template <typename T>
__device__ inline void store(const Pack<T>& pack, T* p, bool aligned, int n) {
  if (aligned && n >= kPack<T>) {
    alignas(16) T raw[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) narrow(pack.v[i], &raw[i]);
    *reinterpret_cast<int4*>(p) = *reinterpret_cast<const int4*>(raw);
  } else {
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i)
      if (i < n) narrow(pack.v[i], p + i);
  }
}

// A row's logits and what its distances are measured from.
template <typename T>
struct Row {
  const T* logits;
  int64_t target;
  float anchor, rate;  // rate: log2(e) / temperature
  bool aligned;

  __device__ Row(const Block& b, int64_t row)
      : logits(static_cast<const T*>(b.logits) + row * b.row_stride),
        target(b.targets[row] - b.first_col),
        anchor(b.anchor[row]),
        rate(b.inverse_temp[row] * kLog2E),
        aligned(reinterpret_cast<uintptr_t>(logits) % 16 == 0) {}
};

// Final logits but for the temperature, in place; returns nothing of the softcap's slope unless
// `slope` is given.
template <typename T>
__device__ inline void finish(const Block& b, int64_t col, Pack<T>& z, Pack<T>* slope) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) {
    if (b.bias && col + i < b.n_cols) z.v[i] += b.bias[col + i];
    z.v[i] *= b.logit_scale;
    if (b.softcap > 0) {
      const float t = tanhf(z.v[i] / b.softcap);
      if (slope) slope->v[i] = 1 - t * t;
      z.v[i] = t * b.softcap;
    }
  }
}

// A thread's running sums over its columns, relative to its own raised anchor; kAll: all of Part.
template <bool kAll>
struct Sums {
  float origin, e = 0, ed = 0, d = 0, ee = 0, max = kExcluded;

  __device__ explicit Sums(float anchor) : origin(anchor) {}

  __device__ void move_to(float raised, float rate) {
    const float by = (raised - origin) * rate, w = exp2f(-by);
    if (by == 0) return;
    if (kAll) {
      ed = w * (ed - by * e);
      ee *= w * w;
    }
    e *= w;
    origin = raised;
  }

  // n of the pack's logits, from column `col`, are inside; the target's is left out.
  template <typename T>
  __device__ void add(const Row<T>& row, const Pack<T>& z, int64_t col, int n) {
    Pack<T> x;
    float top = kExcluded;
    const bool whole = n >= kPack<T> && static_cast<uint64_t>(row.target - col) >= kPack<T>;
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      x.v[i] = (z.v[i] - origin) * row.rate;
      if (!whole && (i >= n || col + i == row.target)) x.v[i] = kExcluded;
      top = fmaxf(top, x.v[i]);
    }
    if (kAll) {
      max = fmaxf(max, top + (origin - row.anchor) * row.rate);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i)
        if (whole || (i < n && col + i != row.target)) d += (z.v[i] - row.anchor) * row.rate;
    }
    if (top > kMaxExponent * kLog2E) {
      const float before = origin, raised = origin + top / row.rate;
      move_to(raised, row.rate);
      const float by = (raised - before) * row.rate;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) x.v[i] -= by;
    }
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (kAll) x.v[i] = fmaxf(x.v[i], kExcluded);
      float p;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(x.v[i]));
      e += p;
      if (kAll) {
        ed += p * x.v[i];
        ee += p * p;
      }
    }
  }

  __device__ void merge(Sums other, float rate) {
    const float common = fmaxf(origin, other.origin);
    move_to(common, rate);
    other.move_to(common, rate);
    e += other.e;
    if (kAll) {
      ed += other.ed;
      d += other.d;
      ee += other.ee;
      max = fmaxf(max, other.max);
    }
  }

  __device__ Sums from_lane(int delta) const {
    Sums s(__shfl_down_sync(~0u, origin, delta));
    s.e = __shfl_down_sync(~0u, e, delta);
    if (kAll) {
      s.ed = __shfl_down_sync(~0u, ed, delta);
      s.d = __shfl_down_sync(~0u, d, delta);
      s.ee = __shfl_down_sync(~0u, ee, delta);
      s.max = __shfl_down_sync(~0u, max, delta);
    }
    return s;
  }
};

// kShaped: the logits have a bias, a scale or a softcap.
template <typename T, bool kAll, bool kShaped>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Block b, float* parts, int64_t cols_per_split) {
  const int64_t index = blockIdx.x, split = blockIdx.y;
  const Row<T> row(b, index);
  const int64_t begin = split * cols_per_split;
  const int64_t end = begin + cols_per_split < b.n_cols ? begin + cols_per_split : b.n_cols;
  Sums<kAll> sums(row.anchor);
  constexpr int64_t kStride = kThreads * kPack<T>;
  for (int64_t base = begin + threadIdx.x * kPack<T>; base < end; base += kStride * kLoads) {
    Pack<T> z[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t left = end - base - k * kStride;
      if (left > 0) z[k] = load(row.logits + base + k * kStride, row.aligned, left < 64 ? left : 64);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      const int64_t col = base + k * kStride, left = end - col;
      if (left <= 0) continue;
      if (kShaped) finish<T>(b, col, z[k], nullptr);
      sums.add(row, z[k], col, left < 64 ? left : 64);
    }
  }

  // A fixed tree: lanes, then warps, so that the order of the sums never changes.
  for (int delta = 16; delta > 0; delta /= 2) sums.merge(sums.from_lane(delta), row.rate);
  __shared__ float shared[kThreads / 32][6];
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    const float values[6] = {sums.origin, sums.e, sums.ed, sums.d, sums.ee, sums.max};
    for (int k = 0; k < 6; ++k) shared[warp][k] = values[k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) {
    Sums<kAll> other(shared[w][0]);
    other.e = shared[w][1], other.ed = shared[w][2], other.d = shared[w][3];
    other.ee = shared[w][4], other.max = shared[w][5];
    sums.merge(other, row.rate);
  }
  constexpr int kCount = kAll ? kParts : kFewestParts;
  const float shift = (sums.origin - row.anchor) * row.rate * kLn2;
  const float values[kParts] = {sums.e,         shift,   sums.ed * kLn2,
                                sums.d * kLn2, sums.ee, sums.max * kLn2};
  for (int k = 0; k < kCount; ++k) parts[(split * kCount + k) * b.n_rows + index] = values[k];
}

template <typename T, bool kShaped>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Block b, const float* shift, const float* alpha, const float* beta,
                    const float* gamma, T* out) {
  const int64_t index = blockIdx.x;
  const Row<T> row(b, index);
  out += index * b.row_stride;
  const bool aligned = row.aligned && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const float origin = row.anchor + shift[index] / b.inverse_temp[index];
  const float factor = b.logit_scale * b.inverse_temp[index];
  const float a = alpha[index] * factor, bt = beta[index] * factor * kLn2;
  const float g = gamma[index] * factor;
  const int64_t step = static_cast<int64_t>(kThreads) * kPack<T> * gridDim.y;
  for (int64_t col = (blockIdx.y * kThreads + threadIdx.x) * int64_t{kPack<T>}; col < b.n_cols;
       col += step) {
    const int n = b.n_cols - col < 64 ? b.n_cols - col : 64;
    Pack<T> z = load(row.logits + col, aligned, n), slope;
    if (kShaped) finish<T>(b, col, z, &slope);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const float d = fmaxf((z.v[i] - origin) * row.rate, kExcluded);
      float p;
      asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(d));
      z.v[i] = p * (a + bt * d);
    }
    if (static_cast<uint64_t>(row.target - col) < kPack<T>) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i)
        if (col + i == row.target) z.v[i] = g;
    }
    if (kShaped && b.softcap > 0) {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) z.v[i] *= slope.v[i];
    }
    store(z, out + col, aligned, n);
  }
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

template <typename Launch>
void dispatch(Scalar dtype, const Block& b, Launch launch) {
  const bool shaped = b.bias || b.softcap > 0 || b.logit_scale != 1;
  const auto of = [&](auto* type) {
    if (shaped) {
      launch(type, std::true_type{});
    } else {
      launch(type, std::false_type{});
    }
  };
  if (dtype == Scalar::f32) of(static_cast<float*>(nullptr));
  if (dtype == Scalar::bf16) of(static_cast<__nv_bfloat16*>(nullptr));
  if (dtype == Scalar::f16) of(static_cast<__half*>(nullptr));
}

}  // namespace

void fold_forward_cuda(const Block& b, Scalar dtype, float* parts, int n_parts, int splits,
                       void* stream) {
  if (b.n_rows == 0) return;
  const int64_t unit = 64;  // a split begins at 16 bytes whatever the logits are
  const int64_t cols_per_split = ((b.n_cols + splits - 1) / splits + unit - 1) / unit * unit;
  dispatch(dtype, b, [&](auto* type, auto shaped) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = n_parts == kFewestParts ? forward_kernel<T, false, shaped.value>
                                                : forward_kernel<T, true, shaped.value>;
    kernel<<<dim3(b.n_rows, splits), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        b, parts, cols_per_split);
  });
  check_launch("fold_forward_cuda");
}

void fold_backward_cuda(const Block& b, Scalar dtype, const float* shift, const float* alpha,
                        const float* beta, const float* gamma, void* out, void* stream) {
  if (b.n_rows == 0) return;
  const int64_t per_block = kThreads * 64;
  const int64_t groups = (b.n_cols + per_block - 1) / per_block;
  dispatch(dtype, b, [&](auto* type, auto shaped) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward_kernel<T, shaped.value>
        <<<dim3(b.n_rows, groups < 65535 ? groups : 65535), kThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(b, shift, alpha, beta, gamma,
                                                static_cast<T*>(out ? out : b.logits));
  });
  check_launch("fold_backward_cuda");
}

}  // namespace prefuse
