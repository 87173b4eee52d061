// Python face of the native module: the only file that knows pybind11. Tensors arrive as
// addresses, sizes and strides that ume_kernels has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ume/cpu_features.h"
#include "ume/linear_bf16.h"
#ifdef UME_WITH_CUDA
#include "ume/cuda_info.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

void linear_bf16(std::uintptr_t y, std::uintptr_t x, std::uintptr_t w, std::uintptr_t b,
                 std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t ldx,
                 std::int64_t ldw, int threads, const std::optional<std::string>& isa) {
  const ume::Isa chosen = isa ? ume::isa_from_name(*isa) : ume::best_isa();
  const ume::LinearBf16 args{address<std::uint16_t>(y),       address<const std::uint16_t>(x),
                             address<const std::uint16_t>(w), address<const std::uint16_t>(b),
                             m, n, k, ldx, ldw};
  py::gil_scoped_release unlocked;
  ume::linear_bf16(args, threads, chosen);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of ume_kernels. Use them through ume_kernels, which checks arguments.";
  m.attr("__version__") = UME_VERSION;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  m.def("cpu_isa", [] { return std::string(ume::isa_name(ume::best_isa())); },
        "Fastest instruction set this machine and build share.");
  m.def("cpu_isas", [] {
        std::vector<std::string> names;
        for (ume::Isa isa : ume::supported_isas()) names.emplace_back(ume::isa_name(isa));
        return names;
      }, "Every instruction set with a path that can run here, slowest first.");
  m.def("cpu_has_amx_bf16", &ume::has_amx_bf16, "Whether the processor has bf16 matrix tiles.");

  m.def("linear_bf16", &linear_bf16, py::arg("y"), py::arg("x"), py::arg("w"), py::arg("b"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("ldx"), py::arg("ldw"),
        py::arg("threads"), py::arg("isa") = py::none(),
        "y[m,n] = x[m,k] @ w[n,k]^T + b[n], bf16 with fp32 accumulation; b = 0 means no bias.");

#ifdef UME_WITH_CUDA
  m.attr("with_cuda") = true;
  m.def("cuda_runtime_version", &ume::cuda_runtime_version,
        "CUDA runtime compiled in, as CUDART_VERSION; does not touch the driver.");
  m.def("cuda_info", [] {
        const ume::CudaInfo info = ume::cuda_info();
        py::dict d;
        d["runtime_version"] = info.runtime_version;
        d["driver_version"] = info.driver_version;
        d["device_count"] = info.device_count;
        d["error"] = info.error;
        return d;
      }, "What the CUDA driver reports; asks it at the time of the call.");
#else
  m.attr("with_cuda") = false;
#endif
}
