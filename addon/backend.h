// The one place that knows which devices this build has.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ops/ops.h"

namespace rodin {

struct BackendOptions {
  std::string device;    // "cpu" | "cuda:0"
  std::string compute;   // "float32" | "auto"
  std::string cpu_path;  // "auto" | "avx512" | "avx2" | "portable"; of no meaning to other devices
  int num_threads = 1;   // the calling thread included
  std::string kv_cache_dtype = "auto";  // "auto" | "bf16" | "fp8"; the latter two on GPUs alone
  // A GPU computes a row by the same kernels whatever the batch, so that its bits are the same; the CPU
  // always does.
  bool is_deterministic = false;
};

// Throws std::runtime_error with one sentence for a device, compute mode or path that does not exist here.
std::unique_ptr<Ops> make_ops(const BackendOptions& options);

// A type of the size of what make_ops(...)->cache_dtype() would be, without making one.
Dtype cache_dtype(const std::string& device, const std::string& compute, const std::string& kv_cache_dtype);

struct DeviceList {
  std::vector<std::string> usable;                            // best first
  std::vector<std::pair<std::string, std::string>> unusable;  // device, reason
};
DeviceList list_devices();

// CPU paths this machine can run, best first; "portable" is always one.
std::vector<std::string> cpu_paths();

}  // namespace rodin
