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

inline void report(const std::string& what, double seconds, double bytes, double operations,
                   double min_gb_per_s, double min_tflops) {
  const double gb = bytes / seconds / 1e9, tflops = operations / seconds / 1e12;
  std::printf("%-44s %9.1f us %7.0f GB/s %7.1f TFLOP/s\n", what.c_str(), seconds * 1e6, gb, tflops);
  std::fflush(stdout);
  CHECK(gb >= min_gb_per_s);
  CHECK(tflops >= min_tflops);
}

// A step of sequences of one length, of which each computes its last tokens without writing them; blocks of
// neighbouring sequences lie side by side.
class EvenIndex {
 public:
  EvenIndex(int64_t batch, int64_t q_len, int64_t context, int64_t block_size) {
    for (int64_t s = 0; s < batch; ++s) {
      for (int64_t i = 0; i < q_len; ++i) {
        positions_.push_back(static_cast<int32_t>(context - q_len + i));
        slots_.push_back(-1);
        seqs_.push_back(static_cast<int32_t>(s));
      }
      q_start_.push_back(static_cast<int32_t>(positions_.size()));
      for (int64_t b = 0; b * block_size < context; ++b)
        table_.push_back(static_cast<int32_t>(b * batch + s));
      table_start_.push_back(static_cast<int32_t>(table_.size()));
    }
    host_.num_seqs = batch;
    host_.num_tokens = batch * q_len;
    host_.block_size = block_size;
    host_.max_q_len = q_len;
    host_.max_context_len = context;
    host_.token_ids = host_.seq_of_token = seqs_.data();
    host_.rope_positions = host_.cache_positions = positions_.data();
    host_.slots = slots_.data();
    host_.q_start = q_start_.data();
    host_.block_table_start = table_start_.data();
    host_.block_table = table_.data();
  }
  EvenIndex(const EvenIndex&) = delete;
  EvenIndex& operator=(const EvenIndex&) = delete;

  const StepIndex& host() const { return host_; }
  const std::vector<int32_t>& table() const { return table_; }
  const std::vector<int32_t>& positions() const { return positions_; }

 private:
  std::vector<int32_t> positions_, slots_, seqs_;  // [T]
  std::vector<int32_t> q_start_ = {0};             // [S + 1]
  std::vector<int32_t> table_start_ = {0};         // [S + 1]
  std::vector<int32_t> table_;                     // [S, blocks]
  StepIndex host_;
};

}  // namespace rodin::test
