#include "ume/cuda/launch_sm90.cuh"
#include "ume/similarity_topk_cuda.h"

namespace ume {

int similarity_topk_blocks_sm90() { return 1; }

void similarity_topk_sm90(const SimilarityTopkCuda& problem, void* stream) {
  using namespace cuda::sm90;
  const Operand q{problem.q, problem.queries, problem.q_stride};
  const Operand c{problem.c, problem.candidates, problem.c_stride};
  const std::int64_t pairs = cuda::tiles_over(problem.queries, kTileRows) * problem.splits;
  launch<ScanProblem>("similarity_topk_sm90", problem.element, q, c, problem.depth, problem, pairs,
                      stream);
}

}  // namespace ume
