// Linear layers with BF16 weights; a file of its own so that the dtypes compile side by side.
#include "cuda/linear_launch.cuh"

namespace rodin::cuda {

void run_linear_bf16(const LinearParams& params, cudaStream_t stream) {
  LinearLauncher<WeightBF16>::run(params, stream);
}

void prepare_linear_bf16() { LinearLauncher<WeightBF16>::prepare(); }

}  // namespace rodin::cuda
