// The table of this translation unit's kernels.
#pragma once

#include "ops/cpu/kernels_attention.h"
#include "ops/cpu/kernels_elementwise.h"
#include "ops/cpu/kernels_expanded.h"

namespace rodin {
namespace {

constexpr Kernels kKernels = {
    kPathName,       kCacheDtype, linear,  absorb,     attend,       combine,   rms_norm, add_to,
    scale_by,        silu_mul,    sigmoid, softmax,    weighted_sum, widen_row, to_cache, attend_gqa,
    attend_expanded, group_key,   probe,   2 * kLanes, read_all,     nullptr,   false,    kQueryTile,
};

}  // namespace
}  // namespace rodin
