// Linear layers with F32 weights; a file of its own so that the dtypes compile side by side.
#include "cuda/linear_launch.cuh"

namespace rodin::cuda {

void run_linear_f32(const LinearParams& params, cudaStream_t stream) {
  LinearLauncher<WeightF32>::run(params, stream);
}

void prepare_linear_f32() { LinearLauncher<WeightF32>::prepare(); }

}  // namespace rodin::cuda
