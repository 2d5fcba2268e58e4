// The AVX-512 path, with products by vdpbf16ps where the weights are FP8 or BF16.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define RODIN_BF16_CACHE
#include "ops/cpu/kernels_bf16.h"
#include "ops/cpu/kernels_bf16_expanded.h"
#include "ops/cpu/kernels_table.h"

namespace rodin {
namespace {

constexpr Kernels with_bf16() {
  Kernels kernels = kKernels;
  kernels.name = "avx512bf16";
  kernels.linear = linear_bf16;
  kernels.attend = attend_bf16;
  kernels.attend_expanded = attend_expanded_bf16;
  kernels.attend_expanded_two = attend_expanded_two_bf16;
  kernels.group_key = group_key_bf16;
  kernels.probe = probe_bf16;
  kernels.probe_flops = 2 * 2 * kLanes;
  kernels.to_bf16 = to_bf16;
  return kernels;
}
constexpr Kernels kBf16Kernels = with_bf16();

}  // namespace

const Kernels& kernels_avx512bf16() { return kBf16Kernels; }

}  // namespace rodin
