// Python sees raw addresses (tensor.data_ptr()) and sizes. Every check sits in the Python wrapper.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
#ifdef PREFUSE_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
}
