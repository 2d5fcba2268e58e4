#include "engine/runner.h"

#include <algorithm>
#include <chrono>

#include "backend.h"
#include "engine/drafter.h"
#include "engine/host_index.h"
#include "engine/latent_cache.h"
#include "engine/row_sampling.h"
#include "model/forward.h"
#include "model/tensor_table.h"
#include "model/weights.h"
#include "ops/check.h"
#include "ops/sample_args.h"

namespace rodin {
namespace {

// Rows of logits held at once; a step with more is worked off in several parts. A GPU reads the head anew for
// each.
constexpr int64_t kMaxLogitRows = 64;
constexpr int64_t kMaxLogitRowsOfGpu = 128;

void fill_index(const StepBatch& batch, HostIndex& index) {
  index.clear();
  for (int64_t s = 0; s < batch.num_seqs(); ++s) {
    const auto at = static_cast<size_t>(s);
    for (auto row = static_cast<size_t>(batch.q_start[at]); row < static_cast<size_t>(batch.q_start[at + 1]);
         ++row) {
      index.add_row(batch.token_ids[row], batch.positions[row], batch.positions[row],
                    batch.slot_mapping[row]);
    }
    index.end_sequence();
  }
}

OpsLimits ops_limits(const RunnerOptions& options) {
  const ModelSpec& spec = options.spec;
  OpsLimits limits;
  limits.max_step_tokens = options.max_step_tokens;
  limits.max_num_seqs = options.max_num_seqs;
  limits.max_logit_rows =
      std::min(options.device == "cpu" ? kMaxLogitRows : kMaxLogitRowsOfGpu, options.max_step_tokens);
  limits.num_blocks = options.num_blocks;
  limits.block_size = options.block_size;
  limits.max_context = std::min(options.num_blocks * options.block_size, spec.max_position_embeddings);
  limits.hidden_size = spec.hidden_size;
  limits.vocab_size = spec.vocab_size;
  limits.mla = mla_shape(spec);
  limits.gqa = gqa_shape(spec);
  limits.intermediate_size = spec.intermediate_size;
  if (spec.num_routed_experts > 0) {
    limits.num_experts = spec.num_routed_experts;
    limits.experts_per_token = spec.num_experts_per_token;
    limits.moe_intermediate_size = spec.moe_intermediate_size;
    limits.shared_intermediate_size = spec.moe_intermediate_size * spec.num_shared_experts;
  }
  limits.max_linear_inputs = std::max(
      {spec.hidden_size * (options.load_mtp ? 2 : 1), spec.intermediate_size, spec.q_lora_rank,
       spec.kv_lora_rank, spec.num_attention_heads * (spec.is_gqa() ? spec.head_dim : spec.v_head_dim),
       limits.moe_intermediate_size, limits.shared_intermediate_size});
  return limits;
}

int64_t num_cache_layers(const ModelSpec& spec, bool load_mtp) {
  return spec.num_hidden_layers + (load_mtp ? 1 : 0);
}

constexpr int64_t kMegabyte = int64_t{1} << 20;

// Says no before anything is read, where the weights alone do not fit.
void check_room(const DeviceMemory& memory, int64_t weight_bytes) {
  check(memory.total == 0 || weight_bytes <= memory.free, "the weights take ", weight_bytes / kMegabyte,
        " MiB, and of the GPU's ", memory.total / kMegabyte, " MiB only ", memory.free / kMegabyte,
        " are free; use a GPU with more memory, or end what else runs on it");
}

// Blocks that fit into what weights and workspace have left of the share of memory that may be used.
int64_t blocks_that_fit(const RunnerOptions& options, const DeviceMemory& memory, int64_t block_bytes,
                        int64_t num_layers) {
  constexpr int64_t kGrain = 2 * kMegabyte;  // every layer's memory is rounded up to it
  const auto usable = static_cast<int64_t>(static_cast<double>(memory.total) * options.memory_utilization);
  const int64_t used = memory.total - memory.free;
  const int64_t left = usable - used - num_layers * kGrain;
  check(left >= block_bytes, "the GPU is out of memory: ", options.memory_utilization, " of its ",
        memory.total / kMegabyte, " MiB (--gpu-memory-utilization) are ", usable / kMegabyte,
        " MiB, of which ", used / kMegabyte,
        " MiB are taken by weights, workspace and other programs; a latent cache of one block takes ",
        (block_bytes + num_layers * kGrain) / kMegabyte,
        " MiB more. Raise the share, or lower --max-step-tokens or --max-num-seqs");
  return std::min(options.num_blocks, left / block_bytes);
}

void append(const StepResult& part, StepResult& result) {
  const auto add = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  const auto offset = static_cast<int32_t>(result.top_ids.size());
  add(result.sampled_ids, part.sampled_ids);
  add(result.sampled_logprobs, part.sampled_logprobs);
  add(result.top_ids, part.top_ids);
  add(result.top_logprobs, part.top_logprobs);
  add(result.non_finite, part.non_finite);
  for (size_t i = 1; i < part.top_start.size(); ++i) result.top_start.push_back(part.top_start[i] + offset);
}

}  // namespace

struct Runner::State {
  std::vector<TensorEntry> entries;  // those that are loaded
  std::unique_ptr<TensorTable> table;
  std::unique_ptr<Ops> ops;
  ModelWeights weights;
  std::unique_ptr<LatentCache> cache;
  std::unique_ptr<Forward> forward;
  std::unique_ptr<Drafter> drafter;  // null without an MTP module

  // Working memory of step().
  HostIndex index;
  std::vector<int32_t> rows;       // token indices of a part of the logits
  std::vector<int32_t> row_seq;    // sequence of each of them
  std::vector<int32_t> positions;  // position of the token sampled from each of them
  RowSampling row_sampling;        // of each of them, where drafts change penalties
  StepResult part;

  void sample(const StepBatch& batch, const Tensor& hidden, int64_t vocab_size, StepResult& result);
  void copy_logits(const Tensor& hidden, const std::vector<int32_t>& all_rows, float* out);
};

Runner::Runner(RunnerOptions options) : options_(std::move(options)) {}

Runner::~Runner() = default;

int64_t Runner::total_bytes() const {
  int64_t total = 0;
  for (const TensorEntry& entry : needed_entries(options_.spec, options_.tensors, options_.load_mtp)) {
    total += entry.bytes;
  }
  return total;
}

RunnerInfo Runner::load(std::atomic<int64_t>& loaded_bytes) {
  const ModelSpec& spec = options_.spec;
  check(!state_, "the model is loaded already");
  check_spec(spec);
  auto state = std::make_unique<State>();
  const BackendOptions backend = {options_.device,         options_.compute,
                                  options_.cpu_path,       static_cast<int>(options_.num_threads),
                                  options_.kv_cache_dtype, options_.is_deterministic};
  state->ops = make_ops(backend);
  check(!spec.is_gqa() || state->ops->has_gqa(), "a checkpoint of type ", spec.model_type,
        " (grouped-query attention) is not supported on ", options_.device, "; use the device cpu");
  state->entries = needed_entries(spec, options_.tensors, options_.load_mtp);
  state->table =
      std::make_unique<TensorTable>(state->entries, spec.weight_block_rows, spec.weight_block_cols);
  state->weights = find_weights(spec, *state->table, options_.load_mtp);
  Ops& ops = *state->ops;
  const int64_t num_layers = num_cache_layers(spec, options_.load_mtp);
  const int64_t row_dim = cache_row_dim(spec, ops.cache_dtype());
  const bool is_synthetic = std::any_of(state->entries.begin(), state->entries.end(),
                                        [](const TensorEntry& entry) { return entry.file.empty(); });
  const auto make_cache = [&](int64_t num_blocks) {
    state->cache = std::make_unique<LatentCache>(ops, num_layers, num_blocks, options_.block_size, row_dim);
    if (is_synthetic) state->cache->fill_synthetic();
  };
  check_room(ops.memory(), total_bytes());
  // A cache of a given size is refused before the weights are read.
  if (options_.memory_utilization == 0) make_cache(options_.num_blocks);
  state->table->make_resident(loaded_bytes, static_cast<int>(options_.num_threads));
  place_weights(state->weights, ops, spec, state->table.get());
  const size_t ops_bytes = ops.reserve(ops_limits(options_));
  state->forward = std::make_unique<Forward>(spec, state->weights, ops, options_.max_step_tokens,
                                             ops_limits(options_).max_logit_rows);
  if (!state->cache) {
    const int64_t block_bytes = num_layers * row_dim * dtype_bytes(ops.cache_dtype()) * options_.block_size;
    make_cache(blocks_that_fit(options_, ops.memory(), block_bytes, num_layers));
  }
  if (options_.load_mtp) {
    state->drafter = std::make_unique<Drafter>(*state->forward, ops, state->cache->layers().back(),
                                               options_.block_size, spec.vocab_size);
  }
  RunnerInfo info;
  info.device = ops.name();
  info.num_blocks = state->cache->layers()[0].latents.rows / options_.block_size;
  info.weight_bytes = total_bytes();
  info.cache_bytes = state->cache->bytes();
  info.workspace_bytes = static_cast<int64_t>(ops_bytes + state->forward->workspace_bytes());
  state_ = std::move(state);
  return info;
}

void Runner::step(const StepBatch& batch, StepResult& result) {
  using Micros = std::chrono::duration<double, std::micro>;
  const auto start = std::chrono::steady_clock::now();
  State& state = *state_;
  fill_index(batch, state.index);
  const StepIndex index = state.ops->begin_step(state.index.view(batch, options_.block_size, 0), 0);
  const Tensor hidden = state.forward->run(index, state.cache->layers());
  const auto vocab_size = static_cast<size_t>(options_.spec.vocab_size);
  state.sample(batch, hidden, options_.spec.vocab_size, result);
  result.logits.resize(batch.logit_rows.size() * vocab_size);
  state.copy_logits(hidden, batch.logit_rows, result.logits.data());
  const auto drafts_start = std::chrono::steady_clock::now();
  result.draft_logits.resize(batch.draft_logit_rows.size() * vocab_size);
  result.draft_start.assign(batch.num_sampled.size() + 1, 0);
  result.draft_ids.clear();
  if (state.drafter) state.drafter->run(batch, hidden, result);
  const auto end = std::chrono::steady_clock::now();
  result.draft_micros = Micros(end - drafts_start).count();
  result.step_micros = Micros(end - start).count();
}

void Runner::State::sample(const StepBatch& batch, const Tensor& hidden, int64_t vocab_size,
                           StepResult& result) {
  result.sampled_ids.clear();
  result.sampled_logprobs.clear();
  result.top_start.assign(1, 0);
  result.top_ids.clear();
  result.top_logprobs.clear();
  result.non_finite.clear();
  rows.clear();
  row_seq.clear();
  positions.clear();
  row_sampling.clear();
  bool has_own_rows = false;  // some row's penalties depend on drafts
  for (int64_t s = 0; s < batch.num_seqs(); ++s) {
    has_own_rows = has_own_rows || (batch.num_sampled[static_cast<size_t>(s)] > 1 && has_penalty(batch, s));
  }
  const auto flush = [&] {
    if (rows.empty()) return;
    const auto num_rows = static_cast<int64_t>(rows.size());
    SampleArgs args;
    args.batch = has_own_rows ? &row_sampling.batch() : &batch;
    args.logits = forward->logits(hidden, rows.data(), num_rows).row<float>(0);
    args.row_seq = row_seq.data();
    args.row_position = positions.data();
    args.num_rows = num_rows;
    args.vocab_size = vocab_size;
    args.result = &part;
    ops->sample(args);
    append(part, result);
    rows.clear();
    row_seq.clear();
    positions.clear();
    row_sampling.clear();
  };
  for (int64_t s = 0; s < batch.num_seqs(); ++s) {
    const int32_t end = batch.q_start[static_cast<size_t>(s) + 1];
    const int32_t first = end - batch.num_sampled[static_cast<size_t>(s)];
    for (int32_t row = first; row < end; ++row) {
      const int32_t* drafts = batch.token_ids.data() + first + 1;  // [row - first] up to this row's token
      rows.push_back(row);
      row_seq.push_back(has_own_rows ? row_sampling.append(batch, s, drafts, row - first, true)
                                     : static_cast<int32_t>(s));
      positions.push_back(batch.positions[static_cast<size_t>(row)] + 1);
      if (static_cast<int64_t>(rows.size()) == forward->max_logit_rows()) flush();
    }
  }
  flush();
}

void Runner::State::copy_logits(const Tensor& hidden, const std::vector<int32_t>& all_rows, float* out) {
  const auto total = static_cast<int64_t>(all_rows.size());
  for (int64_t first = 0; first < total; first += forward->max_logit_rows()) {
    const int64_t count = std::min(forward->max_logit_rows(), total - first);
    const Tensor logits = forward->logits(hidden, all_rows.data() + first, count);
    ops->download(out + first * logits.cols, logits.data,
                  static_cast<size_t>(count * logits.cols) * sizeof(float));
  }
}

int64_t cache_bytes_per_token(const ModelSpec& spec, const std::string& compute, const std::string& device,
                              const std::string& kv_cache_dtype, bool load_mtp) {
  check_spec(spec);
  const Dtype dtype = cache_dtype(device, compute, kv_cache_dtype);
  return num_cache_layers(spec, load_mtp) * cache_row_dim(spec, dtype) * dtype_bytes(dtype);
}

}  // namespace rodin
