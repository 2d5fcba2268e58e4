// Linear layers with F8 weights; a file of its own so that the dtypes compile side by side.
#include "cuda/linear_launch.cuh"

namespace rodin::cuda {

void run_linear_fp8(const LinearParams& params, cudaStream_t stream) {
  LinearLauncher<WeightF8>::run(params, stream);
}

void prepare_linear_fp8() { LinearLauncher<WeightF8>::prepare(); }

}  // namespace rodin::cuda
