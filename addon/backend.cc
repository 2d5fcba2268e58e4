#include "backend.h"

#include "ops/check.h"
#include "ops/cpu/cpu_ops.h"
#include "ops/cpu/cpu_path.h"
#include "ops/cpu/reference_ops.h"
#ifdef WITH_CUDA
#include "cuda/cuda_ops.h"
#endif

namespace rodin {
namespace {

bool is_cuda(const std::string& device) { return device.compare(0, 5, "cuda:") == 0; }

void check_names(const std::string& device, const std::string& compute) {
  check(device == "cpu" || is_cuda(device), "the device '", device, "' does not exist; use cpu or cuda:0");
  check(compute == "float32" || compute == "auto", "the compute mode '", compute,
        "' does not exist; use float32 or auto");
#ifndef WITH_CUDA
  check(!is_cuda(device), "the device '", device, "' is not in this build; build with CUDA or use cpu");
#endif
}

}  // namespace

std::unique_ptr<Ops> make_ops(const BackendOptions& options) {
  [[maybe_unused]] const Dtype dtype = cache_dtype(options.device, options.compute, options.kv_cache_dtype);
#ifdef WITH_CUDA
  if (is_cuda(options.device))
    return make_cuda_ops(options.device, options.compute, dtype, options.is_deterministic);
#endif
  if (options.compute == "float32") return std::make_unique<ReferenceOps>(options.num_threads);
  return std::make_unique<CpuOps>(options.cpu_path, options.num_threads);
}

Dtype cache_dtype(const std::string& device, const std::string& compute, const std::string& kv_cache_dtype) {
  check_names(device, compute);
  check(kv_cache_dtype == "auto" || kv_cache_dtype == "bf16" || kv_cache_dtype == "fp8", "the cache dtype '",
        kv_cache_dtype, "' does not exist; use auto, bf16 or fp8");
  if (is_cuda(device)) return kv_cache_dtype == "fp8" ? Dtype::kF8E4M3 : Dtype::kBF16;
  check(kv_cache_dtype == "auto", "the CPU keeps its latent cache in ", compute == "float32" ? "f32" : "f16",
        " alone; leave out --kv-cache-dtype ", kv_cache_dtype, " or use a GPU");
  return compute == "float32" ? Dtype::kF32 : Dtype::kF16;
}

DeviceList list_devices() {
  DeviceList list;
#ifdef WITH_CUDA
  list_cuda_devices(list.usable, list.unusable);
#else
  list.unusable.emplace_back("cuda:0",
                             "this build has no CUDA kernels: nvcc was not found when it was built");
#endif
  list.usable.push_back("cpu");
  return list;
}

std::vector<std::string> cpu_paths() { return supported_cpu_paths(); }

}  // namespace rodin
