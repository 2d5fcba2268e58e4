// What this machine's cores can do at most: reading memory, and the path's products in registers. The best of
// some passes: whatever else runs on the machine takes from each of them.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "ops/cpu/cpu_ops.h"

namespace rodin {
namespace {

constexpr int64_t kReadFloats = int64_t{128} << 20;  // far above any cache
constexpr int64_t kPieceFloats = int64_t{1} << 20;
constexpr int kNumPasses = 8;
constexpr int64_t kProbeRounds = 2'000'000;

// Seconds of the fastest of kNumPasses calls of fn.
template <class F>
double fastest(const F& fn) {
  double best = 0;
  for (int pass = 0; pass < kNumPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    fn();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = pass == 0 ? seconds : std::min(best, seconds);
  }
  return best;
}

}  // namespace

Ceilings CpuOps::measure_ceilings() {
  Ceilings ceilings;
  const auto num_threads = static_cast<int64_t>(pool_.num_threads());
  auto* data = static_cast<float*>(alloc(static_cast<size_t>(kReadFloats) * sizeof(float)));
  std::fill_n(data, kReadFloats, 1.0f);
  std::atomic<int64_t> sink{0};  // so that nothing is left out
  const double read_seconds = fastest([&] {
    pool_.parallel_for(kReadFloats / kPieceFloats, [&](int64_t task, int) {
      if (kernels_.read(data + task * kPieceFloats, kPieceFloats) < 0) sink += 1;
    });
  });
  free(data);
  ceilings.read_bytes_per_second = static_cast<double>(kReadFloats) * sizeof(float) / read_seconds;

  const double probe_seconds = fastest([&] {
    pool_.parallel_for(num_threads, [&](int64_t, int) {
      float out[16];  // [16]
      kernels_.probe(kProbeRounds, out);
      if (out[0] < 0) sink += 1;
    });
  });
  const auto flops = static_cast<double>(num_threads * kProbeRounds * kProbeProducts * kernels_.probe_flops);
  ceilings.flops_per_second = flops / probe_seconds;
  return ceilings;
}

}  // namespace rodin
