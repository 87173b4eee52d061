#include "ume/contrastive_loss_cuda.h"
#include "ume/cuda/launch_sm90.cuh"

namespace ume {
namespace {

using namespace cuda::sm90;

template <template <typename> class Problem, class Outputs>
void launch_strip(const char* what, const ContrastiveScoresCuda& scores, const Outputs& out,
                  void* stream) {
  const Operand q{scores.q, scores.rows, scores.q_stride};
  const Operand p{scores.p, scores.columns, scores.p_stride};
  const std::int64_t tiles =
      cuda::tiles_over(scores.rows, kTileRows) * cuda::tiles_over(scores.columns, kWidth);
  launch<Problem>(what, scores.element, q, p, scores.depth, Strip<Outputs>{scores, out}, tiles,
                  stream);
}

}  // namespace

int contrastive_tile_width_sm90() { return kWidth; }
int contrastive_tile_height_sm90() { return GroupLayout<kWidth>::kHeight; }

void contrastive_forward_tiles_sm90(const ContrastiveScoresCuda& scores,
                                    const ContrastivePartialsCuda& partials, void* stream) {
  launch_strip<ForwardProblem>("contrastive_lse_sm90", scores, partials, stream);
}

void contrastive_gradient_tiles_sm90(const ContrastiveScoresCuda& scores,
                                     const ContrastiveGradientsCuda& gradients, void* stream) {
  launch_strip<GradientProblem>("contrastive_gradient_sm90", scores, gradients, stream);
}

}  // namespace ume
