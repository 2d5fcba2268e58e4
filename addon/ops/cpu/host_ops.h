// What every CPU implementation of Ops shares: memory, weights that stay where they are, row copies, rotary
// angles, sampling.
#pragma once

#include <memory>

#include "ops/cpu/sample.h"
#include "ops/cpu/thread_pool.h"
#include "ops/ops.h"

namespace rodin {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }

class HostOps : public Ops {
 public:
  explicit HostOps(int num_threads) : pool_(num_threads) {}

  Dtype activation_dtype() const override { return Dtype::kF32; }

  void* alloc(size_t bytes) override;
  void free(void* data) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;

  using Ops::place;
  void place(Weight&) override {}
  const float* place_vector(const float* host, int64_t) override { return host; }
  size_t reserve(const OpsLimits& limits) override;

  StepIndex begin_step(const StepIndex& host, int) override { return host; }
  void rope_table(const StepIndex& index, const RopeParams& params, const Tensor& table) override;
  void gather_rows(const Tensor& from, const int32_t* rows, const Tensor& to) override;
  void sample(const SampleArgs& args) override;

 protected:
  ThreadPool pool_;
  OpsLimits limits_;

 private:
  std::unique_ptr<SampleScratch> sample_scratch_;  // made by reserve()
};

// Rotates one vector of rope_dim values in place; `angles` is [cos | sin] of rope_dim / 2 each.
void apply_rope(float* x, const float* angles, int64_t rope_dim, bool interleave);

// The cache row of a sequence's position. `row` counts slots of the layer.
inline int64_t slot_of(const StepIndex& index, int64_t seq, int64_t position) {
  const int32_t* table = index.block_table + index.block_table_start[seq];
  return table[position / index.block_size] * index.block_size + position % index.block_size;
}

// Chooses experts for one token from its scores (the scoring function applied); see Ops::route. choice and
// group_scores are working memory.
void choose_experts(const float* scores, const MoeWeights& moe, float* choice, float* group_scores,
                    int32_t* expert_ids, float* expert_weights);  // [E], [E], [num_groups], [k], [k]

}  // namespace rodin
