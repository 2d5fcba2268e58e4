#include "engine/runner.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <deque>

#include "backend.h"
#include "engine/drafter.h"
#include "engine/host_index.h"
#include "engine/latent_cache.h"
#include "engine/row_sampling.h"
#include "model/forward.h"
#include "model/quantized_matrix.h"
#include "model/tensor_table.h"
#include "model/weights.h"
#include "ops/check.h"
#include "ops/sample_args.h"

namespace rodin {
namespace {

using Clock = std::chrono::steady_clock;
using Micros = std::chrono::duration<double, std::micro>;

// Rows of logits held at once; a step with more is worked off in several parts. A GPU reads the head anew for
// each.
constexpr int64_t kMaxLogitRows = 64;
constexpr int64_t kMaxLogitRowsOfGpu = 128;

// `ids_before` [R before]: what the step before sampled, to take the place of token ids below 0; null where
// the device knows it alone.
void fill_index(const StepBatch& batch, const std::vector<int32_t>* ids_before, HostIndex& index) {
  index.clear();
  for (int64_t s = 0; s < batch.num_seqs(); ++s) {
    const auto at = static_cast<size_t>(s);
    for (auto row = static_cast<size_t>(batch.q_start[at]); row < static_cast<size_t>(batch.q_start[at + 1]);
         ++row) {
      int32_t token_id = batch.token_ids[row];
      // A row that came out unusable has no token; what follows it is dropped by whoever asked for it.
      if (token_id < 0 && ids_before)
        token_id = std::max((*ids_before)[static_cast<size_t>(-1 - token_id)], 0);
      index.add_row(token_id, batch.positions[row], batch.positions[row], batch.slot_mapping[row]);
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
  std::deque<QuantizedMatrix> heads;  // that were made FP8; on a CPU some Ops go on reading them
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

  // The steps begun: number n is in slot n % kMaxBegun and has the marks 2 n and 2 n + 1 of the device.
  struct Begun {
    bool is_left_running = false;
    StepResult result;  // of one that is not
    Clock::time_point start, end;
  };
  std::array<Begun, kMaxBegun> begun;
  int64_t num_begun = 0;
  int64_t num_finished = 0;
  bool is_before_running = false;   // the step begun last was left running
  Clock::time_point last_end;       // of the step finished last
  std::vector<int32_t> ids_before;  // [R of it] what it sampled, otherwise

  Begun& begun_at(int64_t number) { return begun[static_cast<size_t>(number % kMaxBegun)]; }
  static int mark_of(int64_t number, bool is_end) {
    return static_cast<int>(number * 2 % Ops::kNumMarks) + (is_end ? 1 : 0);
  }
  // Computes the step, or leaves it running.
  void run(const StepBatch& batch, const RunnerOptions& options, Begun& step);
  bool may_be_left(const StepBatch& batch) const;
  // Fills the result's sampling half, or returns true: the device has been told to.
  bool sample(const StepBatch& batch, const Tensor& hidden, int64_t vocab_size, StepResult& result);
  void copy_logits(const Tensor& hidden, const std::vector<int32_t>& all_rows, float* out);

  // Makes the language-model heads FP8, and says by how many bytes the weights have become smaller.
  int64_t quantize_heads(int num_threads);
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
  const int64_t saved_bytes =
      options_.head_dtype == "fp8" ? state->quantize_heads(static_cast<int>(options_.num_threads)) : 0;
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
  info.weight_bytes = total_bytes() - saved_bytes;
  info.cache_bytes = state->cache->bytes();
  info.workspace_bytes = static_cast<int64_t>(ops_bytes + state->forward->workspace_bytes());
  state_ = std::move(state);
  return info;
}

void Runner::begin(const StepBatch& batch) {
  State& state = *state_;
  check(state.num_begun - state.num_finished < kMaxBegun, "more than ", kMaxBegun, " steps at a time");
  State::Begun& step = state.begun_at(state.num_begun);
  step.is_left_running = false;
  step.result = {};
  step.start = Clock::now();
  state.run(batch, options_, step);
  step.end = Clock::now();
  state.is_before_running = step.is_left_running;
  if (!step.is_left_running) state.ids_before = step.result.sampled_ids;
  ++state.num_begun;
}

bool Runner::is_done() {
  const State::Begun& step = state_->begun_at(state_->num_finished);
  return !step.is_left_running || state_->ops->is_sampled(static_cast<int>(state_->num_finished % kMaxBegun));
}

void Runner::finish(StepResult& result) {
  State& state = *state_;
  const int64_t number = state.num_finished;
  check(number < state.num_begun, "no step was begun");
  State::Begun& step = state.begun_at(number);
  ++state.num_finished;
  if (step.is_left_running) {
    state.ops->finish_sample(static_cast<int>(number % kMaxBegun), step.result);
    step.end = Clock::now();
  }
  result = std::move(step.result);
  step.result = {};
  // Nothing waits for a step that samples nothing, and so nothing times it.
  if (!result.sampled_ids.empty()) {
    const int begin_mark = State::mark_of(number, false);
    result.device_micros = state.ops->micros_between(begin_mark, State::mark_of(number, true));
    const bool has_clock = result.device_micros > 0;
    if (!has_clock) result.device_micros = Micros(step.end - step.start).count();
    if (number > 0) {
      result.idle_micros = has_clock ? state.ops->micros_between(State::mark_of(number - 1, true), begin_mark)
                                     : Micros(step.start - state.last_end).count();
    }
  }
  state.last_end = step.end;
}

void Runner::State::run(const StepBatch& batch, const RunnerOptions& options, Begun& step) {
  StepResult& result = step.result;
  result.draft_start.assign(batch.num_sampled.size() + 1, 0);
  fill_index(batch, is_before_running ? nullptr : &ids_before, index);
  const StepIndex step_index = ops->begin_step(index.view(batch, options.block_size, 0), 0);
  ops->mark(mark_of(num_begun, false));
  const Tensor hidden = forward->run(step_index, cache->layers());
  const int64_t vocab_size = options.spec.vocab_size;
  step.is_left_running = sample(batch, hidden, vocab_size, result);
  if (!step.is_left_running) {
    result.logits.resize(batch.logit_rows.size() * static_cast<size_t>(vocab_size));
    copy_logits(hidden, batch.logit_rows, result.logits.data());
    const auto drafts_start = Clock::now();
    result.draft_logits.resize(batch.draft_logit_rows.size() * static_cast<size_t>(vocab_size));
    if (drafter) drafter->run(batch, hidden, result);
    result.draft_micros = Micros(Clock::now() - drafts_start).count();
  }
  ops->mark(mark_of(num_begun, true));
}

// A step may be left running where the host has nothing to do with what it samples.
bool Runner::State::may_be_left(const StepBatch& batch) const {
  const auto is_zero = [](uint8_t flag) { return flag == 0; };
  return batch.num_sampled_rows() <= forward->max_logit_rows() && batch.logit_rows.empty() &&
         std::all_of(batch.run_mtp.begin(), batch.run_mtp.end(), is_zero);
}

bool Runner::State::sample(const StepBatch& batch, const Tensor& hidden, int64_t vocab_size,
                           StepResult& result) {
  result.top_start.assign(1, 0);
  rows.clear();
  row_seq.clear();
  positions.clear();
  row_sampling.clear();
  bool has_own_rows = false;  // some row's penalties depend on drafts
  for (int64_t s = 0; s < batch.num_seqs(); ++s) {
    has_own_rows = has_own_rows || (batch.num_sampled[static_cast<size_t>(s)] > 1 && has_penalty(batch, s));
  }
  const bool is_leaving = may_be_left(batch);
  bool is_left = false;
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
    is_left = is_leaving && ops->begin_sample(args, static_cast<int>(num_begun % kMaxBegun));
    if (!is_left) {
      ops->sample(args);
      append(part, result);
    }
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
  return is_left;
}

int64_t Runner::State::quantize_heads(int num_threads) {
  const Weight head = weights.lm_head;
  int64_t saved = 0;
  const auto quantize = [&](const Weight& from, const char* name) {
    if (from.dtype == Dtype::kF8E4M3) return from;
    const QuantizedMatrix& made = heads.emplace_back(from, num_threads, name);
    saved -= made.bytes();
    if (from.data == weights.embed.data) return made.view();  // embeddings stay as they are
    saved += from.rows * from.cols * dtype_bytes(from.dtype);
    table->release(from);
    return made.view();
  };
  weights.lm_head = quantize(head, "lm_head.weight");
  if (weights.mtp) {
    Weight& own = weights.mtp->head;
    own = own.data == head.data ? weights.lm_head : quantize(own, "the MTP module's head");
  }
  return saved;
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
