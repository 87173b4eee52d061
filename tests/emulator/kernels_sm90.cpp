// The kernels for sm_90a as host functions, with the signatures of kernels_sm80.cpp and three
// blocks at most, so that each walks over several tiles. Each returns nullptr or what went wrong.
#include "ume/cuda/kernels_sm90.cuh"

#include <algorithm>

#include "contrastive_host.h"
#include "ume/cuda/tensor_map.h"

using namespace ume;
using namespace ume::cuda::sm90;

namespace {

constexpr std::int64_t kBlocks = 3;

template <template <typename> class Problem, class Params>
void launch(Element element, const CUtensorMap& q, const CUtensorMap& p, std::int64_t work,
            const Params& params) {
  const auto blocks = static_cast<unsigned>(std::min(work, kBlocks));
  hopper::block() = hopper::Block();  // a block that failed leaves its state behind
  if (element == Element::kBFloat16) {
    emulator::launch(blocks, kThreads, [&] { run_block<Problem<__nv_bfloat16>>(q, p, params); });
  } else {
    emulator::launch(blocks, kThreads, [&] { run_block<Problem<__half>>(q, p, params); });
  }
}

CUtensorMap map_of(const void* data, Element element, std::int64_t rows, std::int64_t depth,
                   std::int64_t stride, int box_rows) {
  return cuda::row_tiles(data, element == Element::kBFloat16, rows, depth, stride, box_rows);
}

template <template <typename> class Problem, class Outputs>
void launch_strip(const ContrastiveScoresCuda& s, const Outputs& out) {
  launch<Problem>(s.element, map_of(s.q, s.element, s.rows, s.depth, s.q_stride, kTileRows),
                  map_of(s.p, s.element, s.columns, s.depth, s.p_stride, kWidth),
                  std::int64_t{emulator::tiles_over(s.rows, kTileRows)} *
                      emulator::tiles_over(s.columns, kWidth),
                  Strip<Outputs>{s, out});
}

// The products themselves, [rows, columns].
struct Store {
  float* s;
  std::int64_t rows, columns, depth;
};

template <typename T>
struct StoreProblem {
  using Element = T;
  using Params = Store;
  using Layout = GroupLayout<kWidth>;
  static constexpr int kTileColumns = kWidth, kStages = 4, kProducerRegisters = 24;

  struct Tiles : MatrixTiles<kTileRows, kTileColumns> {
    Tiles(const Params& params, int block, int blocks)
        : MatrixTiles<kTileRows, kTileColumns>(params.rows, params.columns, block, blocks) {}
  };
  static std::int64_t depth(const Params& params) { return params.depth; }

  struct Epilogue {
    struct Shared {};
    const Params& params;
    const Tiles& tiles;
    int group, thread;

    Epilogue(const Params& p, Shared&, const Tiles& t, int g, int th)
        : params(p), tiles(t), group(g), thread(th) {}
    void load() {}
    void tile(typename Layout::Scores& s) {
      const Layout layout(thread);
      for (int r = 0; r < Layout::kLaneRows; ++r) {
        const std::int64_t row = tiles.row() + group * Layout::kHeight + layout.row(r);
        for (int c = 0; c < Layout::kLaneColumns; ++c) {
          const std::int64_t column = tiles.column() + layout.column(c);
          if (row >= params.rows || column >= params.columns) continue;
          params.s[row * params.columns + column] = Layout::at(s, r, c);
        }
      }
    }
    void finish() {}
  };
};

// Mistakes that the emulator must notice; `d` receives what thread 0 saw of an accumulator or of a
// copied element.
void make_mistake(int which, const CUtensorMap& map, float* seen) {
  unsigned char* const tile = shared_memory();
  auto* const barrier = reinterpret_cast<Barrier*>(tile + 2 * 16384);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(barrier, 16384);
    copy_box(tile, &map, barrier, 0, 0, 0);
    std::uint16_t first;
    std::memcpy(&first, tile, 2);
    *seen = emulator::widen<__nv_bfloat16>(first);
    if (which == 1) barrier_arrive(barrier);
  }
  if (which == 0) return;  // with a copy in flight
  barrier_wait(barrier, 0);
  float d[16][4] = {};
  if (which != 2) wgmma_fence();
  Wgmma<__nv_bfloat16>::multiply(d, tile_descriptor(tile), tile_descriptor(tile), false);
  wgmma_commit();
  if (threadIdx.x == 0) *seen = d[0][0];
  if (which == 3) {
    __syncthreads();
    if (threadIdx.x == 0) std::memset(tile, 0, 64);
  }
  if (which == 4 && threadIdx.x / 32 == 1) barrier_wait(barrier, 1);
  wgmma_wait<0>();
}

}  // namespace

extern "C" {

const char* mistake(int which, const void* ones, float* seen) {
  return emulator::message_of([&] {
    const CUtensorMap map = map_of(ones, Element::kBFloat16, 128, 64, 64, 128);
    hopper::block() = hopper::Block();
    emulator::launch(1, 128, [&] { make_mistake(which, map, seen); });
  });
}

const char* product(const void* q, const void* p, int element, std::int64_t rows,
                    std::int64_t columns, std::int64_t depth, float* s) {
  return emulator::message_of([&] {
    const auto type = static_cast<Element>(element);
    launch<StoreProblem>(type, map_of(q, type, rows, depth, depth, kTileRows),
                         map_of(p, type, columns, depth, depth, kWidth),
                         std::int64_t{emulator::tiles_over(rows, kTileRows)} *
                             emulator::tiles_over(columns, kWidth),
                         Store{s, rows, columns, depth});
  });
}

const char* contrastive_forward(const ContrastiveScoresCuda* scores,
                                const ContrastiveForwardCuda* out) {
  return emulator::message_of([&] {
    emulator::contrastive_forward(*scores, *out, GroupLayout<kWidth>::kHeight, kWidth,
                                  [&](const ContrastivePartialsCuda& partials) {
                                    launch_strip<ForwardProblem>(*scores, partials);
                                  });
  });
}

const char* contrastive_gradient(const ContrastiveScoresCuda* scores,
                                 const ContrastiveGradientsCuda* gradients) {
  return emulator::message_of([&] { launch_strip<GradientProblem>(*scores, *gradients); });
}

const char* similarity_topk(const SimilarityTopkCuda* problem) {
  return emulator::message_of([&] {
    const SimilarityTopkCuda& t = *problem;
    launch<ScanProblem>(t.element,
                        map_of(t.q, t.element, t.queries, t.depth, t.q_stride, kTileRows),
                        map_of(t.c, t.element, t.candidates, t.depth, t.c_stride, kWidth),
                        std::int64_t{emulator::tiles_over(t.queries, kTileRows)} * t.splits, t);
  });
}

void contrastive_finish_columns(const PartialSum* sums, float* lse, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) lse[j] = cuda::log_of(sums[j]);
}

// Bytes of the structures, so that a caller can check its own description of them.
void structure_sizes(std::int64_t sizes[4]) {
  sizes[0] = sizeof(ContrastiveScoresCuda);
  sizes[1] = sizeof(ContrastiveForwardCuda);
  sizes[2] = sizeof(ContrastiveGradientsCuda);
  sizes[3] = sizeof(SimilarityTopkCuda);
}

}  // extern "C"
