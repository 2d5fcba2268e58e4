// Chooses among the linear layers' weight dtypes.
#include "cuda/linear_launch.cuh"

namespace rodin::cuda {

int linear_tile_tokens(int num_tokens) {
  if (num_tokens <= 8) return 8;
  if (num_tokens <= 16) return 16;
  if (num_tokens <= 32) return 32;
  return kWideTokens;
}

void run_linear(const LinearParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.max_rows == 0) return;
  switch (params.weight_dtype) {
    case Dtype::kF8E4M3:
      return run_linear_fp8(params, stream);
    case Dtype::kBF16:
      return run_linear_bf16(params, stream);
    case Dtype::kF16:
      return run_linear_f16(params, stream);
    case Dtype::kF32:
      return run_linear_f32(params, stream);
    case Dtype::kI32:
      break;
  }
  fail("a linear layer's weights cannot be int32");
}

void prepare_linear() {
  prepare_linear_fp8();
  prepare_linear_bf16();
  prepare_linear_f16();
  prepare_linear_f32();
}

}  // namespace rodin::cuda
