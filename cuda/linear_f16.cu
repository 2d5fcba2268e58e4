// Linear layers with F16 weights; a file of its own so that the dtypes compile side by side.
#include "cuda/linear_launch.cuh"

namespace rodin::cuda {

void run_linear_f16(const LinearParams& params, cudaStream_t stream) {
  LinearLauncher<WeightF16>::run(params, stream);
}

void prepare_linear_f16() { LinearLauncher<WeightF16>::prepare(); }

}  // namespace rodin::cuda
