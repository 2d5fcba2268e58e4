// The AVX512-BF16 path with its products by AMX tiles.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define RODIN_BF16_CACHE
#include "ops/cpu/kernels_amx.h"
#include "ops/cpu/kernels_amx_attention.h"
#include "ops/cpu/kernels_bf16_expanded.h"
#include "ops/cpu/kernels_table.h"

namespace rodin {
namespace {

constexpr Kernels with_amx() {
  Kernels kernels = kKernels;
  kernels.name = "amxbf16";
  kernels.linear = linear_amx;
  kernels.attend = attend_amx;
  kernels.attend_expanded = attend_expanded_bf16;
  kernels.attend_expanded_two = attend_expanded_two_bf16;
  kernels.group_key = group_key_bf16;
  kernels.probe = probe_amx;
  kernels.probe_flops = 2 * kTileRows * kPanelOutputs * kTileInputs;
  kernels.to_bf16 = to_bf16;
  kernels.needs_rows_in_line = true;
  kernels.query_tile = kTileHeads;
  return kernels;
}
constexpr Kernels kAmxKernels = with_amx();

}  // namespace

const Kernels& kernels_amxbf16() { return kAmxKernels; }

}  // namespace rodin
