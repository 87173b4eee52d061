// Python face of the native module: the only file that knows pybind11. Tensors arrive as
// addresses, sizes and strides that ume_kernels has checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ume/contrastive_loss.h"
#include "ume/cpu_features.h"
#include "ume/linear.h"
#include "ume/similarity_topk.h"
#include "ume/tile_engine.h"
#ifdef UME_WITH_CUDA
#include "ume/contrastive_loss_cuda.h"
#include "ume/cuda_info.h"
#include "ume/similarity_topk_cuda.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

ume::Isa chosen_isa(const std::optional<std::string>& name) {
  return name ? ume::isa_from_name(*name) : ume::best_isa();
}

template <typename T>
void linear_of(std::uintptr_t y, std::uintptr_t x, std::uintptr_t w, std::uintptr_t b,
               std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t ldx,
               std::int64_t ldw, int threads, const std::optional<std::string>& isa) {
  const ume::Isa chosen = chosen_isa(isa);
  const ume::Linear<T> args{address<T>(y), address<const T>(x), address<const T>(w),
                            address<const T>(b), m, n, k, ldx, ldw};
  py::gil_scoped_release unlocked;
  ume::linear(args, threads, chosen);
}

// (address, element, rows, columns, row stride in elements)
using Matrix = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t>;

ume::MatrixView matrix(const Matrix& m) {
  return {address<const void>(std::get<0>(m)), static_cast<ume::Element>(std::get<1>(m)),
          std::get<2>(m), std::get<3>(m), std::get<4>(m)};
}

// Addresses: row_mask, col_mask, row_group, col_group, ignore_start, ignore_col, row_limit,
// col_limit; 0 for none.
using PairAddresses = std::array<std::uintptr_t, 8>;

ume::ContrastiveScores contrastive_scores(const Matrix& q, const Matrix& p, std::uintptr_t q_inv,
                                          std::uintptr_t p_inv, float scale, std::int64_t offset,
                                          const PairAddresses& pairs) {
  return {matrix(q),
          matrix(p),
          address<const float>(q_inv),
          address<const float>(p_inv),
          scale,
          {offset, address<const std::uint8_t>(pairs[0]), address<const std::uint8_t>(pairs[1]),
           address<const std::int32_t>(pairs[2]), address<const std::int32_t>(pairs[3]),
           address<const std::int64_t>(pairs[4]), address<const std::int32_t>(pairs[5]),
           address<const float>(pairs[6]), address<const float>(pairs[7])}};
}

void contrastive_forward(const Matrix& q, const Matrix& p, std::uintptr_t q_inv,
                         std::uintptr_t p_inv, float scale, std::int64_t offset,
                         const PairAddresses& pairs, std::uintptr_t row_lse,
                         std::uintptr_t col_lse, std::uintptr_t pos, std::uintptr_t hard,
                         std::uintptr_t hard_index, int threads,
                         const std::optional<std::string>& isa) {
  const auto scores = contrastive_scores(q, p, q_inv, p_inv, scale, offset, pairs);
  const ume::ContrastiveForward out{address<float>(row_lse), address<float>(col_lse),
                                    address<float>(pos), address<float>(hard),
                                    address<std::int64_t>(hard_index)};
  const ume::Isa chosen = chosen_isa(isa);
  py::gil_scoped_release unlocked;
  ume::contrastive_forward(scores, out, threads, chosen);
}

// Addresses of `inputs`: row_lse, col_lse, g_row, g_col, g_pos.
void contrastive_backward(const Matrix& q, const Matrix& p, std::uintptr_t q_inv,
                          std::uintptr_t p_inv, float scale, std::int64_t offset,
                          const PairAddresses& pairs,
                          const std::array<std::uintptr_t, 5>& inputs, std::uintptr_t dq,
                          std::uintptr_t dp_sum, std::uintptr_t dscale, int threads,
                          const std::optional<std::string>& isa) {
  const auto scores = contrastive_scores(q, p, q_inv, p_inv, scale, offset, pairs);
  const ume::ContrastiveBackward out{
      address<const float>(inputs[0]), address<const float>(inputs[1]),
      address<const float>(inputs[2]), address<const float>(inputs[3]),
      address<const float>(inputs[4]), address<void>(dq),
      address<float>(dp_sum),          address<float>(dscale)};
  const ume::Isa chosen = chosen_isa(isa);
  py::gil_scoped_release unlocked;
  ume::contrastive_backward(scores, out, threads, chosen);
}

void contrastive_finish(const Matrix& q, const Matrix& p, std::uintptr_t q_inv,
                        std::uintptr_t p_inv, float scale, std::int64_t offset,
                        const PairAddresses& pairs, std::uintptr_t dp_sum, std::uintptr_t dp,
                        int threads, const std::optional<std::string>& isa) {
  const auto scores = contrastive_scores(q, p, q_inv, p_inv, scale, offset, pairs);
  const ume::Isa chosen = chosen_isa(isa);
  py::gil_scoped_release unlocked;
  ume::contrastive_finish(scores, address<const float>(dp_sum), address<void>(dp), threads,
                          chosen);
}

// C[m,n] = A[m,k] B, where B is b[n,k]^T or, if not transposed, b[k,n] itself; c has ldc >= whole
// panels. For the tests of the engine.
void tile_multiply(const Matrix& a, const Matrix& b, bool transposed, std::uintptr_t c,
                   std::int64_t ldc, bool accumulate, bool narrow,
                   const std::optional<std::string>& isa) {
  const ume::Isa chosen = chosen_isa(isa);
  const ume::MatrixView rows = matrix(a), columns = matrix(b);
  const auto compute = ume::compute_for(chosen, rows.element, columns.element);
  const ume::TileEngine& engine = ume::tile_engine(compute, chosen);
  py::gil_scoped_release unlocked;
  const std::int64_t words = engine.words(rows.columns);
  const std::int64_t n = transposed ? columns.rows : columns.columns;
  ume::ScratchBuffer<std::uint32_t> packed(engine.packed_words(n, rows.columns)), staged;
  (transposed ? engine.pack_vectors : engine.pack_matrix)(packed.data(), columns);
  const void* first = rows.data;
  std::int64_t stride = rows.row_stride * ume::element_size(rows.element);
  if (!engine.reads_in_place(rows.element, rows.columns)) {
    engine.stage_rows(staged.reserve(rows.rows * words), rows);
    first = staged.data();
    stride = words * 4;
  }
  float* out = address<float>(c);
  if (narrow)
    engine.multiply_narrow(first, stride, 4, rows.rows, packed.data(), words, out, ldc, accumulate);
  else
    engine.multiply(first, stride, 4, rows.rows, packed.data(), words, engine.panels(n), out, ldc,
                    accumulate);
}

bool similarity_topk_scan(const Matrix& q, const Matrix& c, std::uintptr_t q_inv,
                          std::uintptr_t c_inv, std::uintptr_t allowed,
                          std::int64_t allowed_stride, std::int64_t first, std::uintptr_t keys,
                          std::int64_t k, int threads, const std::optional<std::string>& isa) {
  const ume::TopkScan scan{
      {matrix(q), matrix(c), address<const float>(q_inv), address<const float>(c_inv)},
      address<const std::uint8_t>(allowed),
      allowed_stride,
      first,
      k,
      address<std::int64_t>(keys)};
  const ume::Isa chosen = chosen_isa(isa);
  py::gil_scoped_release unlocked;
  return ume::similarity_topk_scan(scan, threads, chosen);
}

bool similarity_topk_segments(const Matrix& q, const Matrix& c, std::uintptr_t q_inv,
                              std::uintptr_t c_inv, std::uintptr_t offsets, std::uintptr_t rows,
                              std::int64_t first, std::uintptr_t keys, std::int64_t k,
                              int threads, const std::optional<std::string>& isa) {
  const ume::TopkSegments segments{
      {matrix(q), matrix(c), address<const float>(q_inv), address<const float>(c_inv)},
      address<const std::int64_t>(offsets),
      address<const std::int64_t>(rows),
      first,
      k,
      address<std::int64_t>(keys)};
  const ume::Isa chosen = chosen_isa(isa);
  py::gil_scoped_release unlocked;
  return ume::similarity_topk_segments(segments, threads, chosen);
}

#ifdef UME_WITH_CUDA
// What the CUDA functions take: addresses are on the device, `scale` is one too, and `stream` is a
// cudaStream_t of the current device.
ume::ContrastiveScoresCuda contrastive_scores_cuda(const Matrix& q, const Matrix& p,
                                                   std::uintptr_t q_inv, std::uintptr_t p_inv,
                                                   std::uintptr_t scale, std::int64_t offset,
                                                   const PairAddresses& pairs) {
  const ume::ContrastiveScores s = contrastive_scores(q, p, q_inv, p_inv, 0.0f, offset, pairs);
  return {s.q.data, s.p.data, s.q.element, s.q.rows, s.p.rows, s.q.columns, s.q.row_stride,
          s.p.row_stride, s.q_inv, s.p_inv, address<const float>(scale), s.pairs};
}

// Addresses of `outputs`: row_lse, col, pos, hard, hard_index, workspace.
void contrastive_forward_cuda(const Matrix& q, const Matrix& p, std::uintptr_t q_inv,
                              std::uintptr_t p_inv, std::uintptr_t scale, std::int64_t offset,
                              const PairAddresses& pairs,
                              const std::array<std::uintptr_t, 6>& outputs,
                              std::uintptr_t stream) {
  const auto scores = contrastive_scores_cuda(q, p, q_inv, p_inv, scale, offset, pairs);
  const ume::ContrastiveForwardCuda out{
      address<float>(outputs[0]), address<ume::PartialSum>(outputs[1]),
      address<float>(outputs[2]), address<float>(outputs[3]),
      address<std::int64_t>(outputs[4]), address<void>(outputs[5])};
  py::gil_scoped_release unlocked;
  ume::contrastive_forward_cuda(scores, out, address<void>(stream));
}

// Addresses of `inputs`: row_lse, col_lse, g_row, g_col, g_pos.
void contrastive_gradient_cuda(const Matrix& q, const Matrix& p, std::uintptr_t q_inv,
                               std::uintptr_t p_inv, std::uintptr_t scale, std::int64_t offset,
                               const PairAddresses& pairs,
                               const std::array<std::uintptr_t, 5>& inputs, std::uintptr_t u,
                               std::int64_t u_stride, std::uintptr_t stream) {
  const auto scores = contrastive_scores_cuda(q, p, q_inv, p_inv, scale, offset, pairs);
  const ume::ContrastiveGradientsCuda gradients{
      address<const float>(inputs[0]), address<const float>(inputs[1]),
      address<const float>(inputs[2]), address<const float>(inputs[3]),
      address<const float>(inputs[4]), address<void>(u), u_stride};
  py::gil_scoped_release unlocked;
  ume::contrastive_gradient_cuda(scores, gradients, address<void>(stream));
}

void similarity_topk_cuda(const Matrix& q, const Matrix& c, std::uintptr_t q_inv,
                          std::uintptr_t c_inv, std::uintptr_t allowed,
                          std::int64_t allowed_stride, std::int64_t first, int k,
                          std::uintptr_t best, std::int64_t best_stride, int splits,
                          std::uintptr_t buffer, std::uintptr_t keys, std::uintptr_t invalid,
                          std::uintptr_t stream) {
  const ume::MatrixView queries = matrix(q), candidates = matrix(c);
  const ume::SimilarityTopkCuda problem{
      queries.data, candidates.data, queries.element, queries.rows, candidates.rows,
      queries.columns, queries.row_stride, candidates.row_stride, address<const float>(q_inv),
      address<const float>(c_inv), address<const std::uint8_t>(allowed), allowed_stride, first, k,
      address<const std::int64_t>(best), best_stride, splits, address<std::int64_t>(buffer),
      address<std::int64_t>(keys), address<int>(invalid)};
  py::gil_scoped_release unlocked;
  ume::similarity_topk_cuda(problem, address<void>(stream));
}
#endif

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

  const auto def_linear = [&m](const char* name, auto function, const char* text) {
    m.def(name, function, py::arg("y"), py::arg("x"), py::arg("w"), py::arg("b"), py::arg("m"),
          py::arg("n"), py::arg("k"), py::arg("ldx"), py::arg("ldw"), py::arg("threads"),
          py::arg("isa") = py::none(), text);
  };
  def_linear("linear_bf16", &linear_of<std::uint16_t>,
             "y[m,n] = x[m,k] @ w[n,k]^T + b[n], bf16 with fp32 accumulation; b = 0 means none.");
  def_linear("linear_fp32", &linear_of<float>, "The same in fp32.");

  m.def("contrastive_forward", &contrastive_forward,
        "Row and column log-sum-exp of scale <q_i, p_j> q_inv[i] p_inv[j], never stored.");
  m.def("contrastive_backward", &contrastive_backward,
        "Their gradients; that of p is left in dp_sum for contrastive_finish.");
  m.def("contrastive_finish", &contrastive_finish, "dp from dp_sum.");
  m.def("contrastive_dp_columns",
        [](int element, std::int64_t d, const std::optional<std::string>& isa) {
          return ume::contrastive_dp_columns(static_cast<ume::Element>(element), d,
                                             chosen_isa(isa));
        },
        "Columns of dp_sum.");

  m.def("tile_multiply", &tile_multiply, py::arg("a"), py::arg("b"), py::arg("transposed"),
        py::arg("c"), py::arg("ldc"), py::arg("accumulate") = false, py::arg("narrow") = false,
        py::arg("isa") = py::none(), "c = (or +=) a b by the tile engine; for its tests.");
  m.def("tile_lanes", [](int a, int b, const std::optional<std::string>& isa) {
        const ume::Isa chosen = chosen_isa(isa);
        const auto compute = ume::compute_for(chosen, static_cast<ume::Element>(a),
                                              static_cast<ume::Element>(b));
        return ume::tile_engine(compute, chosen).lanes;
      }, py::arg("a"), py::arg("b"), py::arg("isa") = py::none(),
      "Columns of a panel in products of these two element types.");
  m.def("similarity_topk_scan", &similarity_topk_scan, py::arg("q"), py::arg("c"),
        py::arg("q_inv"), py::arg("c_inv"), py::arg("allowed"), py::arg("allowed_stride"),
        py::arg("first"), py::arg("keys"), py::arg("k"), py::arg("threads"),
        py::arg("isa") = py::none(),
        "Merges candidates into keys[Q,k]; returns whether a score is NaN.");
  m.def("similarity_topk_segments", &similarity_topk_segments, py::arg("q"), py::arg("c"),
        py::arg("q_inv"), py::arg("c_inv"), py::arg("offsets"), py::arg("rows"),
        py::arg("first"), py::arg("keys"), py::arg("k"), py::arg("threads"),
        py::arg("isa") = py::none(),
        "Writes the best keys[Q,k] of a list of rows per query; returns whether a score is NaN.");

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

  m.def("contrastive_workspace_cuda", &ume::contrastive_workspace_cuda, py::arg("rows"),
        py::arg("columns"), py::arg("with_columns"), py::arg("with_hardest"),
        "Bytes of scratch of contrastive_forward_cuda on the current device.");
  m.def("contrastive_forward_cuda", &contrastive_forward_cuda,
        "contrastive_forward for a strip of rows on a GPU; the columns' sums continue.");
  m.def("contrastive_gradient_cuda", &contrastive_gradient_cuda,
        "Factor u of the gradients of a strip: scale u p is that of q, scale u^T q that of p.");
  m.def("contrastive_finish_columns_cuda",
        [](std::uintptr_t sums, std::uintptr_t lse, std::int64_t n, std::uintptr_t stream) {
          ume::contrastive_finish_columns_cuda(address<const ume::PartialSum>(sums),
                                               address<float>(lse), n, address<void>(stream));
        },
        "Column log-sum-exp from the sums that the strips left.");
  m.def("similarity_topk_cuda", &similarity_topk_cuda,
        "The best keys of every split of the candidates, on a GPU.");
  m.def("similarity_topk_blocks_cuda", &ume::similarity_topk_blocks_cuda,
        "Blocks of that kernel that a multiprocessor of the current device holds.");
  m.attr("TOPK_CAPACITY_CUDA") = ume::kTopkCapacity;
#else
  m.attr("with_cuda") = false;
#endif
}
