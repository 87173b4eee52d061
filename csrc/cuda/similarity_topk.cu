// Which scan runs.
#include "ume/cuda/launch.h"
#include "ume/similarity_topk_cuda.h"

namespace ume {

int similarity_topk_blocks_cuda() {
#ifdef UME_WITH_SM90
  if (cuda::use_sm90()) return similarity_topk_blocks_sm90();
#endif
  return similarity_topk_blocks_sm80();
}

void similarity_topk_cuda(const SimilarityTopkCuda& problem, void* stream) {
#ifdef UME_WITH_SM90
  if (cuda::use_sm90()) return similarity_topk_sm90(problem, stream);
#endif
  similarity_topk_sm80(problem, stream);
}

}  // namespace ume
