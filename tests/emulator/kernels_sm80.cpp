// The kernels for sm_80 as host functions. Each returns nullptr or what went wrong.
#include "ume/cuda/kernels_sm80.cuh"

#include "contrastive_host.h"

using namespace ume;
using namespace ume::cuda::sm80;

namespace {

template <typename Run>
void with_element(Element element, Run run) {
  if (element == Element::kBFloat16) {
    run(__nv_bfloat16());
  } else {
    run(__half());
  }
}

unsigned tiles_of_scores(const ContrastiveScoresCuda& scores) {
  return static_cast<unsigned>(emulator::tiles_over(scores.rows, Tile::kHeight) *
                               emulator::tiles_over(scores.columns, Tile::kWidth));
}

}  // namespace

extern "C" {

const char* contrastive_forward(const ContrastiveScoresCuda* scores,
                                const ContrastiveForwardCuda* out) {
  return emulator::message_of([&] {
    emulator::contrastive_forward(
        *scores, *out, Tile::kHeight, Tile::kWidth, [&](const ContrastivePartialsCuda& partials) {
          with_element(scores->element, [&](auto element) {
            emulator::launch(tiles_of_scores(*scores), Tile::kThreads,
                             [&] { lse_block<decltype(element)>(*scores, partials); });
          });
        });
  });
}

const char* contrastive_gradient(const ContrastiveScoresCuda* scores,
                                 const ContrastiveGradientsCuda* gradients) {
  return emulator::message_of([&] {
    with_element(scores->element, [&](auto element) {
      emulator::launch(tiles_of_scores(*scores), Tile::kThreads,
                       [&] { gradient_block<decltype(element)>(*scores, *gradients); });
    });
  });
}

const char* similarity_topk(const SimilarityTopkCuda* problem) {
  return emulator::message_of([&] {
    const dim3 grid(static_cast<unsigned>(emulator::tiles_over(problem->queries, Tile::kHeight)),
                    static_cast<unsigned>(problem->splits));
    with_element(problem->element, [&](auto element) {
      emulator::launch(grid, Tile::kThreads, [&] { topk_block<decltype(element)>(*problem); });
    });
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
