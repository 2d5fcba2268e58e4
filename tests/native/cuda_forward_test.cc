// CUDA: whole checkpoints through Runner. The logits of the fixtures against their expected ones, pocket-r1's
// greedy outputs, and the same bits in any batch. Runs from the project's folder.
#include <cstdio>
#include <fstream>
#include <map>

#include "engine/runner.h"
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(__FILE__, __LINE__, "cannot read " + path + "; run the tests from the project's folder");
  return {std::istreambuf_iterator<char>(file), {}};
}

// The integers of the list that begins at or after `at`.
std::vector<int64_t> list_at(const std::string& text, size_t at) {
  std::vector<int64_t> values;
  const size_t end = text.find(']', at);
  for (at = text.find('[', at) + 1; at < end; at = text.find_first_of(",]", at) + 1) {
    values.push_back(std::stoll(text.substr(at)));
  }
  return values;
}

// The header of a safetensors file, which holds {"name":{"dtype":"..","shape":[..],"data_offsets":[..]},..}.
std::vector<TensorEntry> read_entries(const std::string& path) {
  const std::string file = read_file(path);
  uint64_t header_bytes;
  memcpy(&header_bytes, file.data(), 8);
  const std::string header = file.substr(8, header_bytes);
  const std::string key = "\":{\"dtype\":\"";
  std::vector<TensorEntry> entries;
  for (size_t at = header.find(key); at != std::string::npos; at = header.find(key, at + 1)) {
    const size_t name = header.rfind('"', at - 1) + 1;
    const size_t dtype = at + key.size();
    TensorEntry entry;
    entry.name = header.substr(name, at - name);
    entry.dtype = header.substr(dtype, header.find('"', dtype) - dtype);
    entry.shape = list_at(header, header.find("\"shape\"", at));
    const std::vector<int64_t> offsets = list_at(header, header.find("\"data_offsets\"", at));
    entry.file = path;
    entry.offset = static_cast<int64_t>(8 + header_bytes) + offsets[0];
    entry.bytes = offsets[1] - offsets[0];
    entries.push_back(entry);
  }
  CHECK(!entries.empty());
  return entries;
}

struct Checkpoint {
  std::string folder;
  std::vector<std::string> shards;
  ModelSpec spec;
};

ModelSpec small_v3() {
  ModelSpec spec;
  spec.model_type = "deepseek_v3";
  spec.hidden_size = 256;
  spec.intermediate_size = 512;
  spec.moe_intermediate_size = 128;
  spec.num_shared_experts = 1;
  spec.num_expert_groups = 4;
  spec.topk_groups = 2;
  spec.topk_method = "noaux_tc";
  spec.scoring_func = "sigmoid";
  spec.norm_topk_prob = true;
  spec.routed_scaling_factor = 2.5;
  spec.first_k_dense_replace = 1;
  spec.kv_lora_rank = 512;
  spec.q_lora_rank = 128;
  spec.qk_rope_head_dim = 64;
  spec.rms_norm_eps = 1e-6;
  spec.num_mtp_layers = 1;
  spec.weight_block_rows = spec.weight_block_cols = 128;
  return spec;
}

Checkpoint pocket_r1() {
  Checkpoint checkpoint = {"models/pocket-r1", {"model.safetensors"}, small_v3()};
  ModelSpec& spec = checkpoint.spec;
  spec.vocab_size = 1024;
  spec.num_hidden_layers = 6;
  spec.num_attention_heads = 4;
  spec.num_routed_experts = 16;
  spec.num_experts_per_token = 4;
  spec.qk_nope_head_dim = spec.v_head_dim = 64;
  spec.max_position_embeddings = 4096;
  return checkpoint;
}

const std::vector<std::string> kTwoShards = {"model-00001-of-00002.safetensors",
                                             "model-00002-of-00002.safetensors"};

Checkpoint v3_fp8_mtp() {
  Checkpoint checkpoint = {"tests/fixtures/v3-fp8-mtp", kTwoShards, small_v3()};
  ModelSpec& spec = checkpoint.spec;
  spec.vocab_size = 512;
  spec.num_hidden_layers = 3;
  spec.num_attention_heads = 2;
  spec.num_routed_experts = 8;
  spec.num_experts_per_token = 3;
  spec.qk_nope_head_dim = spec.v_head_dim = 128;
  spec.max_position_embeddings = 2560;
  spec.yarn = YarnScaling{40, 32, 1, 1, 1, 64};
  return checkpoint;
}

Checkpoint v2_lite_bf16() {
  Checkpoint checkpoint = {"tests/fixtures/v2-lite-bf16", kTwoShards, {}};
  ModelSpec& spec = checkpoint.spec;
  spec.model_type = "deepseek_v2";
  spec.vocab_size = 512;
  spec.hidden_size = 128;
  spec.intermediate_size = 512;
  spec.moe_intermediate_size = 128;
  spec.num_hidden_layers = 3;
  spec.num_attention_heads = 2;
  spec.num_shared_experts = 2;
  spec.num_routed_experts = 8;
  spec.num_experts_per_token = 3;
  spec.topk_method = "greedy";
  spec.scoring_func = "softmax";
  spec.first_k_dense_replace = 1;
  spec.kv_lora_rank = 512;
  spec.qk_nope_head_dim = spec.v_head_dim = 128;
  spec.qk_rope_head_dim = 64;
  spec.max_position_embeddings = 2560;
  spec.yarn = YarnScaling{40, 32, 1, 0.707, 0.707, 64};
  return checkpoint;
}

constexpr int64_t kBlockSize = 16;
constexpr int64_t kBlocksEach = 24;  // of one sequence

RunnerOptions runner_options(const Checkpoint& checkpoint) {
  RunnerOptions options;
  options.spec = checkpoint.spec;
  for (const std::string& shard : checkpoint.shards) {
    for (TensorEntry& entry : read_entries(checkpoint.folder + "/" + shard)) options.tensors.push_back(entry);
  }
  options.device = "cuda:0";
  options.num_threads = 4;
  options.block_size = kBlockSize;
  options.num_blocks = 48 * kBlocksEach;
  options.max_step_tokens = 512;
  options.max_num_seqs = 64;
  options.load_mtp = checkpoint.spec.num_mtp_layers > 0;
  return options;
}

std::unique_ptr<Runner> load(const Checkpoint& checkpoint, const std::string& device = "cuda:0",
                             const std::string& compute = "auto", const std::string& kv_cache_dtype = "auto",
                             bool is_deterministic = true) {
  RunnerOptions options = runner_options(checkpoint);
  options.device = device;
  options.compute = compute;
  options.kv_cache_dtype = kv_cache_dtype;
  options.is_deterministic = is_deterministic;
  auto runner = std::make_unique<Runner>(options);
  std::atomic<int64_t> loaded{0};
  runner->load(loaded);
  return runner;
}

// Positions begin .. end - 1 of sequence `seq`, whose tokens are ids[begin] ..; the last one is sampled or
// not.
struct Part {
  int64_t seq;
  const std::vector<int32_t>* ids;
  int64_t begin, end;
  bool is_sampled;
};

StepBatch make_batch(const std::vector<Part>& parts, float temperature = 0) {
  StepBatch batch;
  batch.q_start = batch.block_table_start = batch.history_start = batch.bias_start = batch.mask_start = {0};
  for (const Part& part : parts) {
    for (int64_t p = part.begin; p < part.end; ++p) {
      batch.token_ids.push_back((*part.ids)[static_cast<size_t>(p)]);
      batch.positions.push_back(static_cast<int32_t>(p));
      const int64_t block = part.seq * kBlocksEach + p / kBlockSize;
      batch.slot_mapping.push_back(static_cast<int32_t>(block * kBlockSize + p % kBlockSize));
    }
    batch.q_start.push_back(static_cast<int32_t>(batch.token_ids.size()));
    for (int64_t b = 0; b <= (part.end - 1) / kBlockSize; ++b) {
      batch.block_table.push_back(static_cast<int32_t>(part.seq * kBlocksEach + b));
    }
    batch.block_table_start.push_back(static_cast<int32_t>(batch.block_table.size()));
    batch.num_sampled.push_back(part.is_sampled ? 1 : 0);
    batch.run_mtp.push_back(0);
    batch.num_drafts.push_back(0);
    batch.temperature.push_back(temperature);
    batch.top_p.push_back(1);
    batch.top_k.push_back(0);
    batch.min_p.push_back(0);
    batch.seed_low.push_back(17);
    batch.seed_high.push_back(4);
    batch.presence_penalty.push_back(0);
    batch.frequency_penalty.push_back(0);
    batch.repetition_penalty.push_back(1);
    batch.num_logprobs.push_back(3);
    batch.history_start.push_back(0);
    batch.bias_start.push_back(0);
    batch.mask_start.push_back(0);
  }
  return batch;
}

// KL(wanted || got) of each row.
std::vector<double> row_kls(const Floats& got, const Floats& wanted, int64_t vocab_size) {
  CHECK_EQ(got.size(), wanted.size());
  const auto n = static_cast<size_t>(vocab_size);
  std::vector<double> kls;
  const auto log_sum = [n](const float* x) {
    const float max = *std::max_element(x, x + n);
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sum += std::exp(double{x[i]} - max);
    return max + std::log(sum);
  };
  for (size_t row = 0; row < wanted.size(); row += n) {
    const double lse_wanted = log_sum(wanted.data() + row), lse_got = log_sum(got.data() + row);
    double kl = 0;
    for (size_t i = row; i < row + n; ++i) {
      const double p = wanted[i] - lse_wanted;
      kl += std::exp(p) * (p - (got[i] - lse_got));
    }
    kls.push_back(kl);
  }
  return kls;
}

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Where prompts are quantised: half more than Transformers gets in float32 from inputs quantised in the same
// way.
void check_fixture(const Checkpoint& checkpoint, double max_kl, bool is_deterministic = true) {
  const std::unique_ptr<Runner> runner = load(checkpoint, "cuda:0", "auto", "auto", is_deterministic);
  const std::string path = checkpoint.folder + "/reference.safetensors";
  const std::string file = read_file(path);
  std::map<std::string, TensorEntry> reference;
  for (const TensorEntry& entry : read_entries(path)) reference[entry.name] = entry;
  const auto floats_of = [&](const std::string& name) {
    const TensorEntry& entry = reference.at(name);
    Floats values(static_cast<size_t>(entry.bytes / 4));
    memcpy(values.data(), file.data() + entry.offset, values.size() * 4);
    return values;
  };
  const int64_t vocab_size = checkpoint.spec.vocab_size;
  std::vector<double> kls, max_kls, draft_kls;  // mean of each prompt; what it may be; of each row
  int num_prompts = 0;
  for (; reference.count("ids." + std::to_string(num_prompts)); ++num_prompts) {
    const std::string n = std::to_string(num_prompts);
    const TensorEntry& entry = reference.at("ids." + n);
    std::vector<int32_t> ids;
    const int64_t id_bytes = entry.dtype == "I64" ? 8 : 4;
    for (int64_t at = 0; at < entry.bytes; at += id_bytes) {
      int32_t id;
      memcpy(&id, file.data() + entry.offset + at, 4);
      ids.push_back(id);
    }
    const auto length = static_cast<int64_t>(ids.size());
    StepBatch batch = make_batch({{0, &ids, 0, length, false}});
    const Floats wanted = floats_of("logits." + n);
    const int64_t rows = static_cast<int64_t>(wanted.size()) / vocab_size;
    for (int64_t row = length - rows; row < length; ++row)
      batch.logit_rows.push_back(static_cast<int32_t>(row));
    Floats wanted_draft;
    if (checkpoint.spec.num_mtp_layers > 0 && length > 1) {
      batch.run_mtp[0] = 1;
      wanted_draft = floats_of("draft_logits." + n);
      const int64_t draft_rows = static_cast<int64_t>(wanted_draft.size()) / vocab_size;
      for (int64_t row = length - draft_rows; row < length; ++row) {
        batch.draft_logit_rows.push_back(static_cast<int32_t>(row));
      }
    }
    StepResult result;
    runner->step(batch, result);
    const double kl = mean_of(row_kls(result.logits, wanted, vocab_size));
    if (is_deterministic) {
      kls.push_back(kl);
    } else if (length >= 64) {
      kls.push_back(kl);
      max_kls.push_back(1.5 * mean_of(row_kls(floats_of("logits_w8a8." + n), wanted, vocab_size)));
    }
    if (wanted_draft.empty()) continue;
    const std::vector<double> rows_of_prompt = row_kls(result.draft_logits, wanted_draft, vocab_size);
    draft_kls.insert(draft_kls.end(), rows_of_prompt.begin(), rows_of_prompt.end());
  }
  CHECK(num_prompts == 5);
  if (!is_deterministic) max_kl = mean_of(max_kls);
  std::printf("%s: mean KL %.2e\n", checkpoint.folder.c_str(), mean_of(kls));
  CHECK(mean_of(kls) <= max_kl);
  // Nothing says what a draft from quantised inputs would be.
  if (draft_kls.empty() || !is_deterministic) return;
  // A routing flip in the one MoE layer of a random MTP module changes a row altogether (in float32 too, when
  // the cache alone is bf16), so the mean says little.
  std::nth_element(draft_kls.begin(), draft_kls.begin() + draft_kls.size() / 2, draft_kls.end());
  std::printf("%s: median KL of the MTP module %.2e\n", checkpoint.folder.c_str(),
              draft_kls[draft_kls.size() / 2]);
  CHECK(draft_kls[draft_kls.size() / 2] <= max_kl);
}

// Twice what Transformers gets in bf16.
const bool fixture_tests = [] {
  add_cuda_test("forward of v3-fp8-mtp", [] { check_fixture(v3_fp8_mtp(), 2 * 5.5e-2); });
  add_cuda_test("forward of v3-fp8-mtp, prompts quantised", [] { check_fixture(v3_fp8_mtp(), 0, false); });
  add_cuda_test("forward of v2-lite-bf16", [] { check_fixture(v2_lite_bf16(), 2 * 7.6e-3); });
  return true;
}();

// Prompts and answers of pocket-r1 that Transformers made in float32.
struct GreedyLines {
  std::vector<std::vector<int32_t>> prompts, outputs;

  GreedyLines() {
    const std::string lines = read_file("tests/fixtures/pocket-r1-reference/greedy.jsonl");
    for (size_t at = lines.find("\"prompt_ids\""); at != std::string::npos;
         at = lines.find("\"prompt_ids\"", at + 1)) {
      const std::vector<int64_t> prompt = list_at(lines, at),
                                 output = list_at(lines, lines.find("\"output_ids\"", at));
      prompts.emplace_back(prompt.begin(), prompt.end());
      outputs.emplace_back(output.begin(), output.end());
    }
  }
};

// A trained checkpoint on its own text, next to the float32 reference, through both heads.
void check_pocket(const std::string& kv_cache_dtype, double max_kl, bool is_deterministic = true) {
  const std::unique_ptr<Runner> gpu = load(pocket_r1(), "cuda:0", "auto", kv_cache_dtype, is_deterministic),
                                cpu = load(pocket_r1(), "cpu", "float32");
  const GreedyLines lines;
  std::vector<double> kls, draft_kls;
  for (const size_t line : {0, 11, 30}) {
    std::vector<int32_t> ids = lines.prompts[line];
    ids.insert(ids.end(), lines.outputs[line].begin(), lines.outputs[line].end());
    const auto length = static_cast<int32_t>(ids.size());
    StepBatch batch = make_batch({{0, &ids, 0, length, false}});
    batch.run_mtp[0] = 1;
    for (int32_t row = 1; row < length; ++row) {
      batch.logit_rows.push_back(row);
      batch.draft_logit_rows.push_back(row);
    }
    StepResult got, wanted;
    gpu->step(batch, got);
    cpu->step(batch, wanted);
    kls.push_back(mean_of(row_kls(got.logits, wanted.logits, 1024)));
    draft_kls.push_back(mean_of(row_kls(got.draft_logits, wanted.draft_logits, 1024)));
  }
  std::printf("pocket-r1, %s cache: mean KL %.2e, of the MTP module %.2e\n", kv_cache_dtype.c_str(),
              mean_of(kls), mean_of(draft_kls));
  CHECK(mean_of(kls) <= max_kl);
  CHECK(mean_of(draft_kls) <= max_kl);
}

const bool pocket_tests = [] {
  add_cuda_test("forward of pocket-r1 against float32", [] { check_pocket("bf16", 1e-4); });
  add_cuda_test("forward of pocket-r1 against float32, prompts quantised",
                [] { check_pocket("bf16", 2e-3, false); });
  add_cuda_test("forward of pocket-r1 against float32, FP8 cache", [] { check_pocket("fp8", 2e-3); });
  return true;
}();

const bool sized_cache_test = add_cuda_test("runner: the cache takes what weights and workspace leave", [] {
  RunnerOptions options = runner_options(pocket_r1());
  options.num_blocks = 1 << 20;
  options.memory_utilization = 0.5;
  std::atomic<int64_t> loaded{0};
  {
    Runner runner(options);
    const RunnerInfo info = runner.load(loaded);
    const auto half = static_cast<int64_t>(make_gpu()->memory().total / 2);
    CHECK(info.num_blocks > 1 && info.num_blocks <= options.num_blocks);
    CHECK(info.cache_bytes + info.weight_bytes + info.workspace_bytes <= half);
    CHECK(info.num_blocks == options.num_blocks || info.cache_bytes > half / 2);
  }
  options.memory_utilization = 1e-4;
  Runner starved(options);
  loaded = 0;
  CHECK_THROWS(starved.load(loaded), "the GPU is out of memory: ");
  options.memory_utilization = 0;
  options.num_blocks = int64_t{1} << 24;
  Runner greedy(options);
  loaded = 0;
  CHECK_THROWS(greedy.load(loaded), "the GPU is out of memory: ");
});

void check_greedy(bool is_deterministic) {
  const GreedyLines lines;
  std::vector<std::vector<int32_t>> ids = lines.prompts;
  const std::vector<std::vector<int32_t>>& wanted = lines.outputs;
  std::vector<int64_t> done(ids.size(), 0), prompt;
  for (const std::vector<int32_t>& own : ids) prompt.push_back(static_cast<int64_t>(own.size()));
  CHECK_EQ(ids.size(), size_t{48});
  const std::unique_ptr<Runner> runner = load(pocket_r1(), "cuda:0", "auto", "auto", is_deterministic);
  // Prompts in chunks within steps of 512 tokens, decoding beside them.
  const int64_t chunk = is_deterministic ? 48 : 100;
  StepResult result;
  for (;;) {
    std::vector<Part> parts;
    int64_t budget = 512;
    for (size_t s = 0; s < ids.size(); ++s) {
      const auto length = static_cast<int64_t>(ids[s].size());
      if (ids[s].back() == 1 || length >= prompt[s] + 256) continue;
      const int64_t end = std::min({length, done[s] + chunk, done[s] + budget});
      if (end == done[s]) continue;
      parts.push_back({static_cast<int64_t>(s), &ids[s], done[s], end, end == length});
      budget -= end - done[s];
    }
    if (parts.empty()) break;
    runner->step(make_batch(parts), result);
    size_t row = 0;
    for (const Part& part : parts) {
      done[static_cast<size_t>(part.seq)] = part.end;
      if (part.is_sampled) ids[static_cast<size_t>(part.seq)].push_back(result.sampled_ids[row++]);
    }
  }
  int num_equal = 0;
  for (size_t s = 0; s < ids.size(); ++s) {
    num_equal += std::vector<int32_t>(ids[s].begin() + prompt[s], ids[s].end()) == wanted[s];
  }
  std::printf("pocket-r1: %d of 48 greedy outputs equal\n", num_equal);
  CHECK(num_equal >= (is_deterministic ? 46 : 44));
}

const bool greedy_tests = [] {
  add_cuda_test("forward of pocket-r1, 48 greedy outputs", [] { check_greedy(true); });
  add_cuda_test("forward of pocket-r1, 48 greedy outputs, prompts quantised", [] { check_greedy(false); });
  return true;
}();

const bool batch_test = add_cuda_test("forward: the same bits alone, in a batch, in chunks, one by one", [] {
  const std::unique_ptr<Runner> runner = load(pocket_r1());
  CudaRandom random{6};
  std::vector<std::vector<int32_t>> ids(32);
  for (size_t s = 0; s < ids.size(); ++s) {
    const int64_t length = s == 0 ? 70 : 1 + random.below(14);
    for (int64_t i = 0; i < length; ++i) ids[s].push_back(static_cast<int32_t>(random.below(1024)));
  }
  for (const float temperature : {0.0f, 1.0f}) {
    StepResult alone, other;
    runner->step(make_batch({{0, &ids[0], 0, 70, true}}, temperature), alone);
    const auto check_same = [&](size_t row, const char* what) {
      if (other.sampled_ids[row] != alone.sampled_ids[0] ||
          other.sampled_logprobs[row] != alone.sampled_logprobs[0]) {
        fail(__FILE__, __LINE__, std::string(what) + ": another token or log-probability");
      }
      const auto top = static_cast<size_t>(other.top_start[row]);
      for (size_t i = 0; i < 3; ++i) {
        CHECK_EQ(other.top_ids[top + i], alone.top_ids[i]);
        CHECK_EQ(other.top_logprobs[top + i], alone.top_logprobs[i]);
      }
    };
    std::vector<Part> all;
    for (size_t s = 0; s < ids.size(); ++s) {
      const size_t seq = (s + 7) % ids.size();
      all.push_back({static_cast<int64_t>(seq), &ids[seq], 0, static_cast<int64_t>(ids[seq].size()), true});
    }
    runner->step(make_batch(all, temperature), other);
    check_same(25, "in a batch of 32");
    for (const int64_t chunk : {1, 16, 33}) {
      for (int64_t begin = 0; begin < 70; begin += chunk) {
        const int64_t end = std::min<int64_t>(70, begin + chunk);
        runner->step(make_batch({{0, &ids[0], begin, end, end == 70}}, temperature), other);
      }
      check_same(0, "in chunks");
    }
  }
});

}  // namespace
}  // namespace rodin::test
