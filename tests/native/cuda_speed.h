// What the speed tests of the CUDA backend share: how a call is timed and reported.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>

#include "tests/native/cuda_support.h"

namespace rodin::test {

// Seconds of one call, called often enough to outlast launch times; `round` counts the calls.
template <class F>
double seconds_of(Ops& gpu, F&& call) {
  float word;
  const DeviceMatrix probe(gpu, 1, 1, Dtype::kF32);
  const auto run = [&](int count) {
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < count; ++round) call(round);
    gpu.download(&word, probe.tensor().data, 4);  // waits for the device
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  run(3);
  const double once = run(5) / 5;
  const int count = std::max(5, static_cast<int>(0.03 / once));
  double best = run(count) / count;
  for (int i = 0; i < 2; ++i) best = std::min(best, run(count) / count);
  return best;
}

inline void report(const std::string& what, double seconds, double bytes, double operations, double min_gb_per_s,
            double min_tflops) {
  const double gb = bytes / seconds / 1e9, tflops = operations / seconds / 1e12;
  std::printf("%-44s %9.1f us %7.0f GB/s %7.1f TFLOP/s\n", what.c_str(), seconds * 1e6, gb, tflops);
  std::fflush(stdout);
  CHECK(gb >= min_gb_per_s);
  CHECK(tflops >= min_tflops);
}

}  // namespace rodin::test
