#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#include "token_stats.h"

namespace prefuse {
namespace {

constexpr int kThreads = 256;

__device__ inline float load(const float* p, int64_t i) { return p[i]; }
__device__ inline float load(const __nv_bfloat16* p, int64_t i) { return __bfloat162float(p[i]); }
__device__ inline float load(const __half* p, int64_t i) { return __half2float(p[i]); }
__device__ inline void store(float v, float* p, int64_t i) { p[i] = v; }
__device__ inline void store(float v, __nv_bfloat16* p, int64_t i) { p[i] = __float2bfloat16(v); }
__device__ inline void store(float v, __half* p, int64_t i) { p[i] = __float2half(v); }

// A thread's running sums over its columns, relative to its own shift of the anchor.
struct Sums {
  float e = 0, shift = 0, ed = 0, d = 0, ee = 0, max = kExcluded;

  __device__ void move_to(float new_shift) {
    const float raise = new_shift - shift;
    if (raise == 0) return;
    const float w = __expf(-raise);
    ed = w * (ed - raise * e);
    e *= w;
    ee *= w * w;
    shift = new_shift;
  }

  __device__ void add(float distance) {
    d += distance;
    max = fmaxf(max, distance);
    if (distance - shift > kMaxExponent) move_to(distance);
    const float rel = fmaxf(distance - shift, kExcluded), p = expf(rel);
    e += p;
    ed += p * rel;
    ee += p * p;
  }

  __device__ void merge(Sums other) {
    const float common = fmaxf(shift, other.shift);
    move_to(common);
    other.move_to(common);
    e += other.e;
    ed += other.ed;
    d += other.d;
    ee += other.ee;
    max = fmaxf(max, other.max);
  }

  __device__ Sums from_lane(int delta) const {
    Sums s;
    s.e = __shfl_down_sync(~0u, e, delta);
    s.shift = __shfl_down_sync(~0u, shift, delta);
    s.ed = __shfl_down_sync(~0u, ed, delta);
    s.d = __shfl_down_sync(~0u, d, delta);
    s.ee = __shfl_down_sync(~0u, ee, delta);
    s.max = __shfl_down_sync(~0u, max, delta);
    return s;
  }
};

struct Distance {
  float value, cap;
};

template <typename T>
__device__ inline Distance distance(const Block& b, const T* logits, int64_t col, float anchor,
                                    float inverse_temp) {
  float z = load(logits, col);
  if (b.bias) z += b.bias[col];
  z *= b.logit_scale;
  float cap = 1;
  if (b.softcap > 0) {
    const float t = tanhf(z / b.softcap);
    cap = 1 - t * t;
    z = t * b.softcap;
  }
  return {(z - anchor) * inverse_temp, cap};
}

template <typename T>
__global__ void forward_kernel(Block b, float* parts, int64_t cols_per_split) {
  const int64_t row = blockIdx.x, split = blockIdx.y;
  const T* logits = static_cast<const T*>(b.logits) + row * b.row_stride;
  const int64_t target = b.targets[row] - b.first_col;
  const float anchor = b.anchor[row], inverse_temp = b.inverse_temp[row];
  const int64_t begin = split * cols_per_split;
  const int64_t end = begin + cols_per_split < b.n_cols ? begin + cols_per_split : b.n_cols;
  Sums sums;
  for (int64_t col = begin + threadIdx.x; col < end; col += kThreads)
    if (col != target) sums.add(distance(b, logits, col, anchor, inverse_temp).value);

  // A fixed tree: lanes, then warps, so that the order of the sums never changes.
  for (int delta = 16; delta > 0; delta /= 2) sums.merge(sums.from_lane(delta));
  __shared__ Sums warps[kThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) sums.merge(warps[w]);
  const float values[kParts] = {sums.e, sums.shift, sums.ed, sums.d, sums.ee, sums.max};
  for (int k = 0; k < kParts; ++k) parts[(split * kParts + k) * b.n_rows + row] = values[k];
}

template <typename T>
__global__ void backward_kernel(Block b, const float* shift, const float* alpha, const float* beta,
                                const float* gamma, T* out) {
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(b.logits) + row * b.row_stride;
  out += row * b.row_stride;
  const int64_t target = b.targets[row] - b.first_col;
  const float anchor = b.anchor[row], inverse_temp = b.inverse_temp[row];
  const float factor = b.logit_scale * inverse_temp;
  const float row_shift = shift[row], a = alpha[row], bt = beta[row], g = gamma[row];
  const int64_t step = static_cast<int64_t>(kThreads) * gridDim.y;
  for (int64_t col = blockIdx.y * kThreads + threadIdx.x; col < b.n_cols; col += step) {
    const Distance x = distance(b, logits, col, anchor, inverse_temp);
    const float rel = fmaxf(x.value - row_shift, kExcluded);
    const float grad = col == target ? g : expf(rel) * (a + bt * rel);
    store(grad * factor * x.cap, out, col);
  }
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

template <typename Launch>
void dispatch(Scalar dtype, Launch launch) {
  if (dtype == Scalar::f32) launch(static_cast<float*>(nullptr));
  if (dtype == Scalar::bf16) launch(static_cast<__nv_bfloat16*>(nullptr));
  if (dtype == Scalar::f16) launch(static_cast<__half*>(nullptr));
}

}  // namespace

void fold_forward_cuda(const Block& b, Scalar dtype, float* parts, int splits, void* stream) {
  if (b.n_rows == 0) return;
  const int64_t cols_per_split = (b.n_cols + splits - 1) / splits;
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    forward_kernel<T><<<dim3(b.n_rows, splits), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        b, parts, cols_per_split);
  });
  check_launch("fold_forward_cuda");
}

void fold_backward_cuda(const Block& b, Scalar dtype, const float* shift, const float* alpha,
                        const float* beta, const float* gamma, void* out, void* stream) {
  if (b.n_rows == 0) return;
  const int64_t groups = (b.n_cols + kThreads * 16 - 1) / (kThreads * 16);
  dispatch(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    backward_kernel<T>
        <<<dim3(b.n_rows, groups), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            b, shift, alpha, beta, gamma, static_cast<T*>(out ? out : b.logits));
  });
  check_launch("fold_backward_cuda");
}

}  // namespace prefuse
