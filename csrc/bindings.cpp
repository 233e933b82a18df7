// Python sees raw addresses (tensor.data_ptr()) and sizes. Every check sits in the Python wrapper.
#include <pybind11/pybind11.h>

#include "advantage.h"
#include "divergence.h"
#include "pack.h"
#include "policy.h"
#include "segments.h"
#include "token_stats.h"

namespace py = pybind11;
using prefuse::Block;
using prefuse::Scalar;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Block block(Address logits, int64_t n_rows, int64_t n_cols, int64_t row_stride, int64_t first_col,
            Address targets, Address anchor, Address inverse_temp, Address bias, float logit_scale,
            float softcap) {
  return {at(logits),
          n_rows,
          n_cols,
          row_stride,
          first_col,
          at<const int64_t>(targets),
          at<const float>(anchor),
          at<const float>(inverse_temp),
          at<const float>(bias),
          logit_scale,
          softcap};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();

  py::class_<Block>(m, "Block").def(py::init(&block));
  m.def(
      "fold_forward_cpu",
      [](const Block& b, int dtype, Address parts, bool store, int n_threads) {
        prefuse::fold_forward_cpu(b, Scalar(dtype), at<float>(parts), store, n_threads);
      },
      unlocked);
  m.def(
      "fold_backward_cpu",
      [](const Block& b, int dtype, Address shift, Address alpha, Address beta, Address gamma,
         Address out, int n_threads) {
        prefuse::fold_backward_cpu(b, Scalar(dtype), at<float>(shift), at<float>(alpha),
                                   at<float>(beta), at<float>(gamma), at(out), n_threads);
      },
      unlocked);
  m.def(
      "segment_sum_cpu",
      [](Address x, Address cu_seqlens, int64_t n, Address sums, bool is_double, int threads) {
        const auto* bounds = at<const int32_t>(cu_seqlens);
        if (is_double)
          prefuse::segment_sum_cpu(at<const double>(x), bounds, n, at<double>(sums), threads);
        else
          prefuse::segment_sum_cpu(at<const float>(x), bounds, n, at<float>(sums), threads);
      },
      unlocked);
  m.def(
      "segment_spread_cpu",
      [](Address x, Address cu_seqlens, int64_t n, Address out, bool is_double, int threads) {
        const auto* bounds = at<const int32_t>(cu_seqlens);
        if (is_double)
          prefuse::segment_spread_cpu(at<const double>(x), bounds, n, at<double>(out), threads);
        else
          prefuse::segment_spread_cpu(at<const float>(x), bounds, n, at<float>(out), threads);
      },
      unlocked);
  m.def(
      "pack_cpu",
      [](Address lengths, int64_t items, int64_t capacity, Address bin_of) {
        return prefuse::pack_cpu(at<const int64_t>(lengths), items, capacity, at<int64_t>(bin_of));
      },
      unlocked);
  py::class_<prefuse::PolicyArguments>(m, "PolicyArguments")
      .def(py::init([](Address logp, Address old_logp, Address log_ratio, Address advantages,
                       Address mask, Address weight, Address ref_logp, Address loss,
                       Address d_logp, Address d_ratio, Address sums, int64_t tokens, int rule,
                       float low, float high, float cap, int kl, float kl_coef) {
        return prefuse::PolicyArguments{
            at<const float>(logp),       at<const float>(old_logp), at<const float>(log_ratio),
            at<const float>(advantages), at<const uint8_t>(mask),   at<const float>(weight),
            at<const float>(ref_logp),   at<float>(loss),           at<float>(d_logp),
            at<float>(d_ratio),          at<float>(sums),           tokens,
            rule,                        low,                       high,
            cap,                         kl,                        kl_coef};
      }));
  m.def("policy_cpu", &prefuse::policy_cpu, unlocked);
  py::class_<prefuse::GaeArguments>(m, "GaeArguments")
      .def(py::init([](Address rewards, Address values, Address mask, Address bootstrap,
                       Address cu_seqlens, Address logp, Address ref_logp, Address lams,
                       Address critic_lams, Address advantages, Address returns,
                       Address statistics, int64_t tokens, int64_t sequences, float gamma,
                       float lam, float critic_lam, float kl_coef) {
        return prefuse::GaeArguments{
            at<const float>(rewards),      at<const float>(values),
            at<const uint8_t>(mask),       at<const float>(bootstrap),
            at<const int32_t>(cu_seqlens), at<const float>(logp),
            at<const float>(ref_logp),     at<const float>(lams),
            at<const float>(critic_lams),  at<float>(advantages),
            at<float>(returns),            at<double>(statistics),
            tokens,                        sequences,
            gamma,                         lam,
            critic_lam,                    kl_coef};
      }));
  m.def("gae_cpu", &prefuse::gae_cpu, unlocked);
  py::class_<prefuse::DivergenceTile>(m, "DivergenceTile")
      .def(py::init([](Address student, int64_t student_stride, Address student_bias,
                       float student_scale, float student_softcap, Address teacher,
                       int64_t teacher_stride, Address teacher_bias, float teacher_scale,
                       float teacher_softcap, int64_t rows, int64_t cols, Address inverse_temp,
                       int kind, double weight) {
        return prefuse::DivergenceTile{
            {at<const float>(student), student_stride, at<const float>(student_bias),
             student_scale, student_softcap},
            {at<const float>(teacher), teacher_stride, at<const float>(teacher_bias),
             teacher_scale, teacher_softcap},
            rows, cols, at<const float>(inverse_temp), kind, weight};
      }));
  m.def(
      "divergence_statistics_cpu",
      [](const prefuse::DivergenceTile& tile, Address stats, int threads) {
        prefuse::divergence_statistics_cpu(tile, at<float>(stats), threads);
      },
      unlocked);
  m.def(
      "divergence_gradient_cpu",
      [](const prefuse::DivergenceTile& tile, Address stats, Address out, int64_t out_stride,
         int threads) {
        prefuse::divergence_gradient_cpu(tile, at<const float>(stats), at<float>(out), out_stride,
                                         threads);
      },
      unlocked);

#ifdef PREFUSE_CUDA
  m.attr("has_cuda") = true;
  m.def("fold_forward_cuda", [](const Block& b, int dtype, Address parts, int n_parts, int splits,
                                Address stream) {
    prefuse::fold_forward_cuda(b, Scalar(dtype), at<float>(parts), n_parts, splits, at(stream));
  });
  m.def("fold_backward_cuda", [](const Block& b, int dtype, Address shift, Address alpha,
                                 Address beta, Address gamma, Address out, Address stream) {
    prefuse::fold_backward_cuda(b, Scalar(dtype), at<float>(shift), at<float>(alpha),
                                at<float>(beta), at<float>(gamma), at(out), at(stream));
  });
  m.def("gae_cuda_scratch", &prefuse::gae_cuda_scratch);
  m.def("gae_cuda", [](const prefuse::GaeArguments& args, Address scratch, Address stream) {
    prefuse::gae_cuda(args, at(scratch), at(stream));
  });
#else
  m.attr("has_cuda") = false;
#endif
}
