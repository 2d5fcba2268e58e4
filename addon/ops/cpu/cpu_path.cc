#include "ops/cpu/cpu_path.h"

#include "ops/check.h"
#include "ops/cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rodin {
namespace {

// Whether the processor has AMX-BF16 and the system lets this process use it: Linux wants to be asked first,
// once or more often, and every thread of the process may then.
[[maybe_unused]] bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // edx of leaf 7
  constexpr long kRequestPermission = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> supported_cpu_paths() {
  std::vector<std::string> paths;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16")) {
      if (may_use_amx()) paths.push_back("amxbf16");
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
    if (name == "amxbf16") return kernels_amxbf16();
    if (name == "avx512bf16") return kernels_avx512bf16();
    if (name == "avx512") return kernels_avx512();
    if (name == "avx2") return kernels_avx2();
#endif
    return kernels_portable();
  }
  fail("the CPU path '", path, "' does not exist on this machine; use auto or one of ", list);
}

}  // namespace rodin
