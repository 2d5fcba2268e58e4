// Entry to the CUDA backend; includes nothing of CUDA, so that any file may include it.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ops/ops.h"

namespace rodin {

// device: "cuda:N"; compute: "auto". Throws std::runtime_error with one sentence where that is not possible.
// cache_dtype: kBF16 or kF8E4M3. is_deterministic: BackendOptions.
std::unique_ptr<Ops> make_cuda_ops(const std::string& device, const std::string& compute, Dtype cache_dtype,
                                   bool is_deterministic);

// Appends the GPUs that can be used ("cuda:0", ..) and those that cannot, each with its reason. Without a
// driver: one entry for cuda:0. Throws nothing.
void list_cuda_devices(std::vector<std::string>& usable,
                       std::vector<std::pair<std::string, std::string>>& unusable);

}  // namespace rodin
