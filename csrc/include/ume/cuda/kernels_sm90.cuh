// What each kernel for sm_90a computes: Problems for kernel_sm90.cuh.
#pragma once

#include "ume/cuda/epilogue_gradient.cuh"
#include "ume/cuda/epilogue_lse.cuh"
#include "ume/cuda/epilogue_topk.cuh"
#include "ume/cuda/kernel_sm90.cuh"
#include "ume/cuda/tile_order_sm90.cuh"

namespace ume::cuda::sm90 {

// Accumulators of 64 x 256 are 128 registers per thread and leave enough for every epilogue.
inline constexpr int kWidth = 256;

template <class Outputs>
struct Strip {
  ContrastiveScoresCuda scores;
  Outputs out;
};

// What forward and backward share: the walk, and which 64 rows this group has.
template <typename T, class Outputs>
struct StripProblem {
  using Element = T;
  using Params = Strip<Outputs>;
  using Layout = GroupLayout<kWidth>;
  static constexpr int kTileColumns = kWidth, kStages = 4, kProducerRegisters = 24;

  struct Tiles : MatrixTiles<kTileRows, kTileColumns> {
    __device__ __forceinline__ Tiles(const Params& params, int block, int blocks)
        : MatrixTiles<kTileRows, kTileColumns>(params.scores.rows, params.scores.columns, block,
                                               blocks) {}
  };
  static __device__ __forceinline__ std::int64_t depth(const Params& params) {
    return params.scores.depth;
  }

  struct Place {
    const Params& params;
    const Tiles& tiles;
    int group, thread;

    __device__ __forceinline__ int row() const { return tiles.row() + group * Layout::kHeight; }
    __device__ __forceinline__ int column() const { return tiles.column(); }
    // The lower group may lie below the last row: its partial sums have no place then.
    __device__ __forceinline__ bool inside() const { return row() < params.scores.rows; }
  };
};

template <typename T>
struct ForwardProblem : StripProblem<T, ContrastivePartialsCuda> {
  using Base = StripProblem<T, ContrastivePartialsCuda>;

  struct Epilogue {
    using Lse = LseEpilogue<typename Base::Layout, GroupSync>;
    using Shared = typename Lse::Shared;

    const typename Base::Params& params;
    Shared& shared;
    const typename Base::Place at;

    __device__ __forceinline__ Epilogue(const typename Base::Params& p, Shared& s,
                                        const typename Base::Tiles& tiles, int group, int thread)
        : params(p), shared(s), at{p, tiles, group, thread} {}

    __device__ __forceinline__ void load() {
      Lse::load(shared, params.scores, at.row(), at.column(), at.thread);
      GroupSync::sync();
    }
    __device__ __forceinline__ void tile(typename Base::Layout::Scores& s) {
      if (!at.inside()) return;
      Lse::tile(shared, params.scores, params.out, s, at.row(), at.column(), at.thread);
    }
    __device__ __forceinline__ void finish() {}
  };
};

template <typename T>
struct GradientProblem : StripProblem<T, ContrastiveGradientsCuda> {
  using Base = StripProblem<T, ContrastiveGradientsCuda>;

  struct Epilogue {
    using Gradient = GradientEpilogue<typename Base::Layout, T>;
    using Shared = typename Gradient::Shared;

    const typename Base::Params& params;
    Shared& shared;
    const typename Base::Place at;

    __device__ __forceinline__ Epilogue(const typename Base::Params& p, Shared& s,
                                        const typename Base::Tiles& tiles, int group, int thread)
        : params(p), shared(s), at{p, tiles, group, thread} {}

    __device__ __forceinline__ void load() {
      GroupSync::sync();  // the tile before has been read
      Gradient::load(shared, params.scores, params.out, at.row(), at.column(), at.thread);
      GroupSync::sync();
    }
    __device__ __forceinline__ void tile(typename Base::Layout::Scores& s) {
      if (!at.inside()) return;
      Gradient::tile(shared, params.scores, params.out, s, at.row(), at.column(), at.thread);
    }
    __device__ __forceinline__ void finish() {}
  };
};

template <typename T>
struct ScanProblem {
  using Element = T;
  using Params = SimilarityTopkCuda;
  using Layout = GroupLayout<kWidth>;
  static constexpr int kTileColumns = kWidth, kStages = 4, kProducerRegisters = 40;

  struct Tiles : SplitTiles<kTileRows, kTileColumns> {
    __device__ __forceinline__ Tiles(const Params& params, int block, int blocks)
        : SplitTiles<kTileRows, kTileColumns>(params.queries, params.candidates, params.splits,
                                              block, blocks) {}
  };
  static __device__ __forceinline__ std::int64_t depth(const Params& params) {
    return params.depth;
  }

  struct Epilogue {
    using Topk = TopkEpilogue<Layout, GroupSync>;
    using Shared = typename Topk::Shared;

    const Params& params;
    Shared& shared;
    const Tiles& tiles;
    Tiles unwalked;
    int group, thread;

    __device__ __forceinline__ Epilogue(const Params& p, Shared& s, const Tiles& t, int g, int th)
        : params(p), shared(s), tiles(t), unwalked(t), group(g), thread(th) {}

    __device__ __forceinline__ int row(const Tiles& at) const {
      return at.row() + group * Layout::kHeight;
    }
    __device__ __forceinline__ void load() {
      GroupSync::sync();  // the tile before has been read
      if (tiles.first()) Topk::start(shared, params, row(tiles), thread);
      Topk::load(shared, params, tiles.column(), thread);
      GroupSync::sync();
    }
    __device__ __forceinline__ void tile(typename Layout::Scores& s) {
      Topk::tile(shared, params, s, row(tiles), tiles.column(), tiles.split(), thread);
      if (tiles.last()) Topk::finish(shared, params, row(tiles), tiles.split(), thread);
    }
    // More splits than tiles: some have none, but their keys are read all the same.
    __device__ __forceinline__ void finish() {
      while (unwalked.next_pair()) {
        if (!unwalked.empty()) continue;
        GroupSync::sync();
        Topk::start(shared, params, row(unwalked), thread);
        GroupSync::sync();
        Topk::finish(shared, params, row(unwalked), unwalked.split(), thread);
      }
    }
  };
};

}  // namespace ume::cuda::sm90
