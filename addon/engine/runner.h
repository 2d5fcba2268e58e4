// Runner: weights, latent cache, workspace and Ops of one model on one device. Holds nothing of a request: a
// step is a function of weights, cache contents and batch. Used from one thread, the engine thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/step.h"
#include "model/spec.h"

namespace rodin {

// Twin of RunnerOptions in server/engine/addon.ts.
struct RunnerOptions {
  ModelSpec spec;
  std::vector<TensorEntry> tensors;
  std::string device = "cpu";     // "cpu" | "cuda:0"
  std::string compute = "auto";   // "float32" | "auto"
  std::string cpu_path = "auto";  // "auto" or one of supported_cpu_paths()
  int64_t num_threads = 1;        // compute threads, the engine thread included
  int64_t block_size = 0;
  int64_t num_blocks = 0;  // of the latent cache; the most of them where memory_utilization is not 0
  // 0, or the share of the GPU's memory that weights, workspace and cache take together: the cache gets what
  // is left of it.
  double memory_utilization = 0;
  std::string kv_cache_dtype = "auto";  // "auto" | "bf16" | "fp8"
  std::string head_dtype = "auto";      // "auto": the checkpoint's; "fp8": made so at loading
  bool is_deterministic = false;        // BackendOptions
  int64_t max_step_tokens = 0;
  int64_t max_num_seqs = 0;
  bool load_mtp = false;
};

struct RunnerInfo {
  std::string device;  // e.g. "cpu (avx512)"
  int64_t num_blocks = 0;
  int64_t weight_bytes = 0;
  int64_t cache_bytes = 0;
  int64_t workspace_bytes = 0;
};

class Runner {
 public:
  static constexpr int kMaxBegun = 2;

  // Keeps the options; touches no file.
  explicit Runner(RunnerOptions options);
  ~Runner();
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;

  // Sum of the bytes of the tensors that load() will map (no MTP tensors without load_mtp): the total that
  // loaded_bytes of load() rises to.
  int64_t total_bytes() const;

  // Maps and checks the weights, allocates cache and workspace. Throws std::runtime_error with one sentence;
  // the Runner can then only be destroyed. loaded_bytes rises while pages are made resident.
  RunnerInfo load(std::atomic<int64_t>& loaded_bytes);

  // Begins one validated batch (engine/validate.h); token ids below 0 name rows of the one begun before.
  // Where the device can, the step is left running and this returns; otherwise it has been computed by then.
  // At most kMaxBegun may be begun and not finished.
  void begin(const StepBatch& batch);
  // Whether finish() would not wait; with a step begun.
  bool is_done();
  // Waits for the oldest step begun. Every vector of the result is overwritten.
  void finish(StepResult& result);
  void step(const StepBatch& batch, StepResult& result) {
    begin(batch);
    finish(result);
  }

 private:
  struct State;
  const RunnerOptions options_;
  std::unique_ptr<State> state_;  // null until load()
};

// Bytes one token takes in the latent cache over all layers, the MTP module's included if it is loaded.
int64_t cache_bytes_per_token(const ModelSpec& spec, const std::string& compute, const std::string& device,
                              const std::string& kv_cache_dtype, bool load_mtp);

}  // namespace rodin
