#include "ops/cpu/cpu_path.h"

#include "ops/check.h"
#include "ops/cpu/kernels.h"

namespace rodin {

std::vector<std::string> supported_cpu_paths() {
  std::vector<std::string> paths;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) {
      paths.push_back("avx512bf16");
    }
    paths.push_back("avx512");
  }
  if (has_avx2) paths.push_back("avx2");
#endif
  paths.push_back("portable");
  return paths;
}

const Kernels& kernels_of_path(const std::string& path) {
  const std::vector<std::string> paths = supported_cpu_paths();
  const std::string& wanted = path == "auto" ? paths.front() : path;
  std::string list;
  for (const std::string& name : paths) {
    list += (list.empty() ? "" : ", ") + name;
    if (name != wanted) continue;
#if defined(__x86_64__)
    if (name == "avx512bf16") return kernels_avx512bf16();
    if (name == "avx512") return kernels_avx512();
    if (name == "avx2") return kernels_avx2();
#endif
    return kernels_portable();
  }
  fail("the CPU path '", path, "' does not exist on this machine; use auto or one of ", list);
}

}  // namespace rodin
