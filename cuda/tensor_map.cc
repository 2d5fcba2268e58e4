#include "cuda/tensor_map.h"

#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstring>

#include "cuda/cuda_check.h"

namespace rodin::cuda {
namespace {

using Encode = PFN_cuTensorMapEncodeTiled_v12000;

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  RODIN_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                              &found));
  check(found == cudaDriverEntryPointSuccess && function != nullptr,
        "the NVIDIA driver has no cuTensorMapEncodeTiled; install a driver for CUDA 12 or later");
  return reinterpret_cast<Encode>(function);
}

CUtensorMapDataType type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF8E4M3:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    case Dtype::kBF16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Dtype::kF32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    default:
      fail("a tensor map takes FP8, bf16 or float32");
  }
}

}  // namespace

TensorMap make_tensor_map(const MatrixShape& shape, Dtype dtype, Swizzle swizzle) {
  static const Encode encode = find_encode();
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(shape.cols), static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(shape.row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(shape.box_cols),
                             static_cast<cuuint32_t>(shape.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, type_of(dtype), 2, const_cast<void*>(shape.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle == Swizzle::k128Bytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "a tensor map of ", shape.rows, " x ", shape.cols, " with rows of ",
        shape.row_bytes, " bytes and boxes of ", shape.box_rows, " x ", shape.box_cols,
        " was refused with error ", static_cast<int>(result));
  TensorMap out;
  memcpy(&out, &map, sizeof(out));
  return out;
}

}  // namespace rodin::cuda
