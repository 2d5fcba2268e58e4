// CudaOps: Ops on one sm_90 GPU. One stream; nothing waits for the device but sample(), finish_sample(),
// download() and upload(). Activations and the latent cache are bf16, sums float32. The class fills params
// structs; the arithmetic is in the kernels. cuda_ops.cc: memory and elementwise ops; cuda_place.cc: weights;
// cuda_linear.cc: linear layers and MoE; cuda_attention.cc: MLA; cuda_gqa.cc: GQA; cuda_sample.cc: sampling.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device_memory.h"
#include "cuda/kernels.h"
#include "cuda/mla_plan.h"
#include "cuda/mla_prefill_plan.h"
#include "cuda/quantized.h"
#include "cuda/step_graph.h"
#include "cuda/uploader.h"
#include "ops/ops.h"
#include "ops/sample_args.h"

namespace rodin::cuda {

// What place() makes of an MoE layer.
struct PlacedMoe {
  const WeightView* gate = nullptr;  // [E + 1] device memory; the last one is the shared expert
  const WeightView* up = nullptr;    // [E + 1]
  const WeightView* down = nullptr;  // [E + 1]
  Dtype gate_dtype = Dtype::kBF16;
  Dtype down_dtype = Dtype::kBF16;
  // Boxes of the same matrices for linear_wgmma and linear_split; null where the layer is not for these.
  const TensorMap* gate_maps = nullptr;        // [E + 1] as the tables above, if has_shared_maps
  const TensorMap* up_maps = nullptr;          // [E + 1]
  const TensorMap* down_maps = nullptr;        // [E + 1] for both
  const TensorMap* split_gate_maps = nullptr;  // [E + 1]
  const TensorMap* split_up_maps = nullptr;    // [E + 1]
  bool has_shared_maps = false;
  bool is_shared_grouped = false;  // the shared expert has the routed ones' dtypes and runs with them
  bool is_uniform = false;         // all routed experts' matrices are laid out as the first one's
};

// What place() makes of an attention layer.
struct PlacedMla {
  WeightView w_uk;  // [A * lora_rank, nope_dim] the transposed half of kv_b
};

class CudaOps final : public Ops {
 public:
  CudaOps(int device_id, Dtype cache_dtype, bool is_deterministic);
  ~CudaOps() override;

  std::string name() const override;
  Dtype activation_dtype() const override { return Dtype::kBF16; }
  Dtype cache_dtype() const override { return cache_dtype_; }

  void* alloc(size_t bytes) override;
  void free(void* data) override;
  void upload(void* device, const void* host, size_t bytes) override;
  void download(void* host, const void* device, size_t bytes) override;
  DeviceMemory memory() const override;
  Ceilings measure_ceilings() override;

  using Ops::place;
  void place(Weight& weight) override;
  const float* place_vector(const float* host, int64_t size) override;
  void place(MoeWeights& moe) override;
  void place(MlaWeights& mla) override;
  size_t reserve(const OpsLimits& limits) override;

  StepIndex begin_step(const StepIndex& host, int which) override;
  void run_recorded(const StepIndex& index, const std::function<void()>& body) override;
  void rope_table(const StepIndex& index, const RopeParams& params, const Tensor& table) override;
  void embed(const Weight& table, const StepIndex& index, const Tensor& out) override;
  void rms_norm(const Tensor& x, const float* weight, float eps, const Tensor& out) override;
  void add_rms_norm(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                    const Tensor& out) override;
  void linear(const Tensor& x, const Weight& weight, const Tensor& out) override;
  void linear_pair(const Tensor& x, const Weight& weight0, const Tensor& out0, const Weight& weight1,
                   const Tensor& out1) override;
  void gate_up_silu(const Tensor& x, const MlpWeights& mlp, const Tensor& out) override;
  void gather_rows(const Tensor& from, const int32_t* rows, const Tensor& to) override;
  void mla_rope_store(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                      const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache) override;
  void mla_attention(const Tensor& q, const MlaWeights& mla, const StepIndex& index, const CacheLayer& cache,
                     const Tensor& out) override;
  void mla_store_and_attend(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                            const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache,
                            const Tensor& out) override;
  bool mla_joined(const Tensor& x, const PendingNorm* norm, const MlaWeights& mla, float eps,
                  const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache, const Tensor& q,
                  const Tensor& kv, const Tensor& attention, const Tensor& out) override;
  bool has_gqa() const override { return true; }
  void gqa_rope_store(const Tensor& q, const Tensor& kv, const GqaShape& shape, const Tensor& rope_table,
                      const StepIndex& index, const CacheLayer& cache) override;
  void gqa_attention(const Tensor& q, const GqaShape& shape, const StepIndex& index, const CacheLayer& cache,
                     const Tensor& out) override;
  void route(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
             const Tensor& expert_weights) override;
  void moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids, const Tensor& expert_weights,
           const Tensor& out) override;
  void add_rms_norm_route(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                          const Tensor& out, const MoeWeights& moe, const Tensor& expert_ids,
                          const Tensor& expert_weights) override;
  void moe_add_rms_norm(const Tensor& x, const MoeWeights& weights, const Tensor& expert_ids,
                        const Tensor& expert_weights, const Tensor& delta, const Tensor& residual,
                        const float* weight, float eps, const Tensor& out) override;
  bool moe_joined(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                  const MoeWeights& moe, const float* next_weight, const Tensor& expert_ids,
                  const Tensor& expert_weights, const Tensor& out) override;
  void sample(const SampleArgs& args) override;
  bool begin_sample(const SampleArgs& args, int slot) override;
  bool is_sampled(int slot) override;
  void finish_sample(int slot, SampleResult& result) override;
  void mark(int mark) override;
  double micros_between(int first, int last) override;

 private:
  struct Step {
    StepArrays arrays;
    MlaPlan plan;
    MlaPrefillPlan prefill;
    const MlaTile* tiles = nullptr;              // device
    const PrefillTile* prefill_tiles = nullptr;  // device
    const int32_t* prefill_slots = nullptr;      // device
    const int32_t* q_start = nullptr;            // device; tells whose StepIndex one is
    bool is_decode = false;                      // every sequence has a token and at most its drafts
  };

  // One call of sample() or begin_sample(): its settings on their way to the device, its results back.
  struct SampleSlot {
    StepArrays arrays;
    std::vector<SampleRow> rows;        // [R]
    SampleOutcome* outcomes = nullptr;  // pinned [max_logit_rows]
    int32_t* top_ids = nullptr;         // pinned [max_logit_rows * kSampleMaxTop]
    float* top_logprobs = nullptr;      // pinned [max_logit_rows * kSampleMaxTop]
    cudaEvent_t done = nullptr;         // the results are in host memory
  };

  // A matrix that must be widened, or a kv_b whose W_UK must be transposed, once the uploads are done.
  struct PendingWiden {
    WidenParams params;
    void* temporary;  // freed afterwards
  };
  struct PendingTranspose {
    WeightView kv_b;
    TransposeParams params;
    bool is_widened;  // the kernel reads a bf16 copy of kv_b
  };

  // The one that begin_step() made this index for.
  const Step& step_of(const StepIndex& index) const;
  Uploader& uploader();
  // Copies a host matrix into the arena with padded rows.
  void* upload_rows(const void* host, int64_t row_bytes, int64_t padded_bytes, int64_t rows);
  // Waits for the uploads and runs what depends on them.
  void finish_placing();
  void widen_and_transpose(const PendingTranspose& pending);
  // Of the experts' matrices, where all of them have boxes.
  void place_maps(const MoeWeights& moe, PlacedMoe& placed);
  template <class T>
  const T* upload_table(const std::vector<T>& table);

  RopeStoreParams rope_store_params(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                                    const Tensor& rope_table, const StepIndex& index,
                                    const CacheLayer& cache) const;
  // has_q_latent: q_latent_ holds q_nope W_UK of the only chunk.
  void attend(const Tensor& q, const MlaWeights& mla, const StepIndex& index, const CacheLayer& cache,
              const Tensor& out, bool has_q_latent);
  MlaEnterParams enter_params(const Tensor& q, const Tensor& kv, const MlaWeights& mla, float eps,
                              const Tensor& rope_table, const StepIndex& index,
                              const CacheLayer& cache) const;
  MlaParams mla_params(const Tensor& q, const MlaShape& shape, const StepIndex& index,
                       const CacheLayer& cache, const Step& step, const MlaChunk& chunk) const;
  MlaLeaveParams leave_params(const MlaParams& params, const MlaWeights& mla, const Tensor& out) const;
  // Attention of one chunk up to the splits' results.
  void run_chunk(const MlaParams& mla, const Tensor& q, const Tensor& q_latent, const CacheLayer& cache);
  GqaParams gqa_params(const Tensor& q, const GqaShape& shape, const StepIndex& index,
                       const CacheLayer& cache) const;
  LinearParams linear_params(const Tensor& x, const Tensor& out, const WeightView& weight) const;
  void run_mlp_linear(const Tensor& x, const MlpWeights& mlp, const Tensor& out);
  // Whether a layer takes linear_split; `end`: tokens from which on it is quantised instead.
  bool is_splitting(int64_t num_tokens, int64_t end) const;
  bool is_splitting(const WeightView& weight, int64_t num_tokens, bool is_gated) const;
  void reserve_split();
  SplitParams split_params(const QuantizedView& x, int64_t num_rows, int32_t tile_tokens,
                           const WeightView& weight) const;
  SplitParams split_params(const Tensor& x, const WeightView& weight);
  void run_split_mlp(const Tensor& x, const MlpWeights& mlp, const Tensor& out);
  void run_split_moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids);
  MoePlanParams plan_params(int64_t num_tokens, const MoeWeights& moe, const Tensor& expert_ids,
                            bool has_shared, int32_t tile_tokens) const;
  // Makes the plan, unless route() has made that of these ids.
  void make_plan(const MoePlanParams& plan);
  // Whether a layer of so many tokens takes the kernels that quantise them.
  bool is_quantizing(const WeightView& weight, int64_t num_tokens) const;
  bool is_quantizing(const MlpWeights& mlp, int64_t num_tokens) const;
  QuantizedView quantized_view(int64_t max_rows, int64_t cols, int rows_each = 1);
  // The view for fewer channels; throws where there is not enough room.
  QuantizedView fitted(QuantizedView view, int64_t num_rows, int64_t cols) const;
  QuantizeParams quantize_params(const Tensor& x, const QuantizedView& out) const;
  // Each token's row once for each of its experts, in the plan's order, to `routed`, and once in its place
  // for the shared one, to `plain`.
  QuantizeParams slot_inputs(const Tensor& x, const QuantizedView& plain, const QuantizedView& routed,
                             int32_t experts_per_token, bool has_shared) const;
  QuantizedView quantize(const Tensor& x);
  WgmmaParams wgmma_params(const QuantizedView& x, int64_t num_rows, const WeightView& weight) const;
  WgmmaParams gated_params(const Tensor& x, const MlpWeights& mlp);
  void run_quantized_moe(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids);
  void reserve_quantized();
  void reserve_moe();
  void reserve_decode_moe();
  void reserve_attention();
  // Whether prompts may attend over keys and values that kv_b has expanded.
  bool is_expandable(const WeightView& kv_b, const MlaShape& shape) const;
  void reserve_prefill();
  void prefill_attention(const Tensor& q, const MlaWeights& mla, const Step& step, const CacheLayer& cache,
                         const Tensor& out);
  void reserve_sample();
  void release_sample();
  void enqueue_sample(const SampleArgs& args, SampleSlot& slot);
  // Waits for the slot's results.
  void collect_sample(SampleSlot& slot, SampleResult& result);
  // delta: null where nothing is added.
  NormParams norm_params(const Tensor& x, const Tensor* delta, const float* weight, float eps,
                         const Tensor& out) const;
  RouteKernelParams route_params(int64_t num_tokens, const MoeWeights& moe, const Tensor& expert_ids,
                                 const Tensor& expert_weights);
  // Runs the experts of at most moe_tokens_ tokens; what is returned adds their results up into `out`.
  MoeCombineParams moe_chunk(const Tensor& x, const MoeWeights& moe, const Tensor& expert_ids,
                             const Tensor& expert_weights, const Tensor& out);
  void run_shared(const Tensor& x, const MoeWeights& moe);
  MoeCombineParams combine_params(const Tensor& x, const MoeWeights& moe, const Tensor& expert_weights,
                                  const Tensor& out) const;
  // The host-side rest of sample(): rows that ask for more likeliest tokens than the GPU selects.
  void select_on_host(const SampleArgs& args, int64_t row, double lse);
  template <class T>
  T* workspace(int64_t count) {
    return static_cast<T*>(workspace_.alloc(static_cast<size_t>(count) * sizeof(T)));
  }

  const int device_id_;
  const Dtype cache_dtype_;
  const bool is_deterministic_;  // one regime of kernels for any number of tokens
  cudaStream_t stream_ = nullptr;
  int32_t num_multiprocessors_ = 0;
  OpsLimits limits_;
  bool is_reserved_ = false;

  DeviceArena weights_;
  DeviceArena small_;             // weights of few bytes
  std::deque<WeightView> views_;  // Weight::packed points at these
  std::deque<PlacedMoe> moes_;
  std::deque<PlacedMla> mlas_;
  std::unique_ptr<Uploader> uploader_;    // while something is being placed
  std::deque<std::vector<char>> tables_;  // host copies that the uploader reads
  std::vector<PendingWiden> widens_;
  std::vector<PendingTranspose> transposes_;
  const float* one_ = nullptr;  // [1] 1.0f: the scale of FP8 matrices without one

  DeviceArena workspace_;
  Step steps_[2];  // [2] decoder layers, MTP module
  StepGraphs graphs_;
  StepArrays gathers_[4];  // [4] used in turn
  int next_gather_ = 0;

  // MoE, for up to moe_tokens_ tokens at a time.
  int64_t moe_tokens_ = 0;
  MoePlan moe_plan_;
  const int32_t* planned_ids_ = nullptr;  // route() made moe_plan_ for these ids of one token; null otherwise
  float* router_logits_ = nullptr;        // [max_step_tokens, E]
  uint32_t* gate_done_ = nullptr;         // [kGateFewTokens] 0 between launches
  uint32_t* units_taken_ = nullptr;       // [1] of decode_experts; 0 between layers
  int32_t num_decode_clusters_ = 0;       // of decode_experts, side by side
  Tensor expert_mid_;                     // [moe_tokens * k, Im]
  Tensor shared_mid_;                     // [moe_tokens, Is]
  Tensor expert_out_;                     // [moe_tokens * k, H]
  Tensor shared_out_;                     // [moe_tokens, H]

  // Layers of many tokens, whose inputs are quantised.
  QuantizedView quantized_;             // [max_step_tokens, max_linear_inputs]
  QuantizedView expert_quantized_;      // [moe_tokens * k, H]
  QuantizedView expert_mid_quantized_;  // [moe_tokens * k, Im]
  QuantizedView shared_mid_quantized_;  // [moe_tokens, Is]

  // The same in two exact parts, for few tokens; data has two rows for each.
  QuantizedView split_;             // [most tokens, max_linear_inputs]
  QuantizedView expert_split_;      // [.. * k, H]
  QuantizedView expert_mid_split_;  // [.. * k, Im]
  QuantizedView shared_mid_split_;  // [.., Is]

  // Attention, for one chunk of tokens.
  bool has_mla_wgmma_ = false;
  MlaPlan::Limits plan_limits_;
  int64_t attention_tokens_ = 0;  // most tokens of a chunk
  int64_t partial_rows_ = 0;      // (token, head, split) triples of a chunk
  int64_t latent_stride_ = 0;
  void* q_latent_ = nullptr;      // bf16 [attention_tokens, A, latent_stride]
  void* out_latent_ = nullptr;    // the same
  float* partial_ = nullptr;      // [partial_rows, lora_rank]
  float* partial_ml_ = nullptr;   // [partial_rows, 2]
  uint64_t* arrivals_ = nullptr;  // [2] of the blocks of decode_enter, of decode_leave

  // Attention of prompts in its naive form.
  bool has_prefill_weights_ = true;  // every kv_b so far has kernels for many tokens
  int64_t prefill_keys_ = 0;         // most keys of a step; 0: all attention is absorbed
  int64_t prefill_head_keys_ = 0;    // most keys * heads at a time
  QuantizedView prefill_latents_;    // [prefill_keys, lora_rank]
  void* prefill_rope_ = nullptr;     // bf16 [prefill_keys, rope_dim]
  void* prefill_kv_ = nullptr;       // bf16 [prefill_head_keys, nope_dim + v_dim]

  // Sampling.
  float* adjusted_ = nullptr;                 // [max_logit_rows, V]
  SampleChunk* sample_chunks_ = nullptr;      // [max_logit_rows, num_chunks]
  SampleNoiseChunk* noise_chunks_ = nullptr;  // [max_logit_rows, num_chunks]
  SampleOutcome* outcomes_ = nullptr;         // [max_logit_rows] of the last call; embed() reads them
  int32_t* top_ids_ = nullptr;                // [max_logit_rows * kSampleMaxTop]
  float* top_logprobs_ = nullptr;             // [max_logit_rows * kSampleMaxTop]
  SampleSlot sample_slots_[3];                // [3] the two of begin_sample(), that of sample()
  cudaEvent_t marks_[kNumMarks] = {};         // [kNumMarks]
};

// Fewest tokens whose linear layers pay for quantising them.
constexpr int64_t kMinQuantizedTokens = 64;
// Fewest tokens whose experts do.
constexpr int64_t kMinQuantizedMoeTokens = 256;
// Fewest tokens of a sequence for which its keys and values are expanded.
constexpr int64_t kMinPrefillTokens = 64;

// Whether kernels that take weights in boxes of 64 rows and kBlockK columns, each with one scale, have this
// one.
bool has_boxes(const WeightView& weight);
bool has_boxes(const MlpWeights& mlp);
TensorMap weight_map(const WeightView& weight, int32_t box_rows = 64);
LinearIo io_of(const Tensor& x, const Tensor& out);
bool has_aligned_rows(const Tensor& x);  // every row begins at a multiple of 16 bytes

// The placed form of a weight; throws for one that place() has not seen.
const WeightView& view_of(const Weight& weight);

}  // namespace rodin::cuda
