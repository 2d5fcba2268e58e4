// CUDA: rotation, cache writes and latent attention against the float32 reference, and the same bits however
// the rows are batched and chunked.
#include "tests/native/cuda_support.h"

namespace rodin::test {
namespace {

struct Span {
  int64_t begin, end;  // positions computed in this step
};

struct AttentionCase {
  std::string name;
  int64_t num_heads, nope_dim, rope_dim, v_dim, lora_rank;
  Dtype dtype;
  std::vector<Span> spans;  // one per sequence
  int64_t block_size;
  int64_t first_position = 0;
  bool is_interleaved = true;
  Dtype cache_dtype = Dtype::kBF16;
  // False: prompts attend in the naive form, over quantised latents, and splits depend on the step.
  bool is_deterministic = true;
};

// An FP8 cache row: 512 e4m3, 4 scales, 64 rotary values in bf16.
constexpr int64_t kFp8Row = 512 + 16 + 128;

// What the kernels read it as.
void decode_fp8_row(const uint8_t* row, float* to) {  // [kFp8Row], [576]
  for (int i = 0; i < 512; ++i) {
    float scale;
    memcpy(&scale, row + 512 + i / 128 * 4, 4);
    to[i] = float_of_e4m3(row[i]) * scale;
  }
  for (int i = 0; i < 64; ++i) to[512 + i] = element_as_float(row + 528, Dtype::kBF16, i);
}

// The cache on the device; poisoned but for the rows that are set.
class DeviceCache {
 public:
  DeviceCache(Ops& ops, Dtype dtype, const Floats& rows, int64_t num_slots, int64_t latent_dim)
      : ops_(ops), dtype_(dtype), num_slots_(num_slots), latent_dim_(latent_dim) {
    const int64_t row_bytes = dtype == Dtype::kF8E4M3 ? kFp8Row : latent_dim * 2;
    bytes_.assign(static_cast<size_t>(num_slots * row_bytes), 0xff);
    const int64_t cols = dtype == Dtype::kF8E4M3 ? kFp8Row : latent_dim;
    layer_.latents = {ops.alloc(bytes_.size()), dtype, num_slots, cols, cols};
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      const float* row = rows.data() + slot * latent_dim;
      if (!std::isnan(row[0])) set(slot, row);
    }
    ops.upload(layer_.latents.data, bytes_.data(), bytes_.size());
  }
  ~DeviceCache() { ops_.free(layer_.latents.data); }
  DeviceCache(const DeviceCache&) = delete;
  DeviceCache& operator=(const DeviceCache&) = delete;

  const CacheLayer& layer() const { return layer_; }

  const std::vector<uint8_t>& raw() {
    ops_.download(bytes_.data(), layer_.latents.data, bytes_.size());
    return bytes_;
  }
  // All rows as the kernels read them.
  Floats get() {
    raw();
    Floats values(static_cast<size_t>(num_slots_ * latent_dim_));
    for (int64_t slot = 0; slot < num_slots_; ++slot) {
      float* to = values.data() + slot * latent_dim_;
      if (dtype_ == Dtype::kF8E4M3) {
        decode_fp8_row(bytes_.data() + slot * kFp8Row, to);
      } else {
        const uint8_t* row = bytes_.data() + slot * latent_dim_ * 2;
        for (int64_t i = 0; i < latent_dim_; ++i) to[i] = element_as_float(row, Dtype::kBF16, i);
      }
    }
    return values;
  }

 private:
  void set(int64_t slot, const float* row) {
    const auto put_bf16 = [](uint8_t* to, float value) {
      const uint16_t bits = bf16_of_float(value);
      memcpy(to, &bits, 2);
    };
    if (dtype_ != Dtype::kF8E4M3) {
      for (int64_t i = 0; i < latent_dim_; ++i)
        put_bf16(bytes_.data() + (slot * latent_dim_ + i) * 2, row[i]);
      return;
    }
    uint8_t* to = bytes_.data() + slot * kFp8Row;
    for (int group = 0; group < 4; ++group) {
      float most = 0;
      for (int i = 0; i < 128; ++i) most = std::max(most, std::fabs(row[group * 128 + i]));
      const float scale = most / 448;
      memcpy(to + 512 + 4 * group, &scale, 4);
      for (int i = 0; i < 128; ++i) to[group * 128 + i] = e4m3_of_float(row[group * 128 + i] / scale);
    }
    for (int i = 0; i < 64; ++i) put_bf16(to + 528 + 2 * i, row[512 + i]);
  }

  Ops& ops_;
  const Dtype dtype_;
  const int64_t num_slots_, latent_dim_;
  std::vector<uint8_t> bytes_;  // [num_slots, row bytes]
  CacheLayer layer_;
};

// A step's index on the host.
struct HostStep {
  std::vector<int32_t> token_ids, positions, slots, q_start, seq_of_token, table_start, table;
  StepIndex index;

  // Sequence s has the blocks tables[s].
  HostStep(const std::vector<Span>& spans, const std::vector<std::vector<int32_t>>& tables,
           int64_t block_size, int64_t first_position) {
    q_start.push_back(0);
    table_start.push_back(0);
    for (size_t s = 0; s < spans.size(); ++s) {
      for (int64_t p = spans[s].begin; p < spans[s].end; ++p) {
        positions.push_back(static_cast<int32_t>(p));
        const auto block = static_cast<size_t>(p / block_size);
        slots.push_back(static_cast<int32_t>(tables[s][block] * block_size + p % block_size));
        seq_of_token.push_back(static_cast<int32_t>(s));
        token_ids.push_back(0);
        index.max_context_len = std::max(index.max_context_len, p + 1);
      }
      index.max_q_len = std::max(index.max_q_len, spans[s].end - spans[s].begin);
      q_start.push_back(static_cast<int32_t>(positions.size()));
      table.insert(table.end(), tables[s].begin(), tables[s].end());
      table_start.push_back(static_cast<int32_t>(table.size()));
    }
    index.num_seqs = static_cast<int64_t>(spans.size());
    index.num_tokens = static_cast<int64_t>(positions.size());
    index.block_size = block_size;
    index.first_position = first_position;
    index.token_ids = token_ids.data();
    index.rope_positions = index.cache_positions = positions.data();
    index.slots = slots.data();
    index.q_start = q_start.data();
    index.seq_of_token = seq_of_token.data();
    index.block_table_start = table_start.data();
    index.block_table = table.data();
  }
};

constexpr int64_t kPromptTokens = 64;  // from so many on a sequence attends in the naive form

// Each 128 of them in e4m3 and back.
void quantize_latents(float* row, int64_t lora_rank) {  // [lora_rank]
  for (float* at = row; at < row + lora_rank; at += 128) {
    float most = 0;
    for (int i = 0; i < 128; ++i) most = std::max(most, std::fabs(at[i]));
    if (!(most > 0)) continue;
    for (int i = 0; i < 128; ++i) at[i] = float_of_e4m3(e4m3_of_float(at[i] * (448 / most))) * (most / 448);
  }
}

void check_attention(const AttentionCase& c) {
  CudaRandom random{21};
  const bool is_fp8 = c.cache_dtype == Dtype::kF8E4M3;
  const std::unique_ptr<Ops> gpu = make_gpu(is_fp8 ? "fp8" : "auto", c.is_deterministic);
  ReferenceOps reference(16);
  MlaWeights mla;
  mla.shape = {c.num_heads, c.nope_dim, c.rope_dim, c.v_dim, c.lora_rank, 0, c.is_interleaved};
  mla.shape.softmax_scale = 1.5f / std::sqrt(static_cast<float>(mla.shape.qk_dim()));
  std::vector<std::unique_ptr<HostWeight>> weights;
  const auto add = [&](int64_t rows, int64_t cols) {
    weights.push_back(random_weight(random, rows, cols, c.dtype));
    return weights.back()->view;
  };
  const int64_t heads_qk = c.num_heads * mla.shape.qk_dim(), latent_dim = mla.shape.latent_dim();
  mla.q_b = add(heads_qk, 16);
  mla.kv_a = add(latent_dim, 16);
  mla.kv_b = add(c.num_heads * (c.nope_dim + c.v_dim), c.lora_rank);
  mla.o = add(16, c.num_heads * c.v_dim);
  const Floats norm = random_floats(random, c.lora_rank, 1);
  mla.kv_a_norm = norm.data();
  MlaWeights placed = mla;
  gpu->place(placed);

  int64_t num_blocks = 0;
  for (const Span& span : c.spans) num_blocks += (span.end + c.block_size - 1) / c.block_size;
  OpsLimits limits = test_limits(mla.shape);
  limits.num_blocks = num_blocks;
  limits.block_size = c.block_size;
  gpu->reserve(limits);
  std::vector<int32_t> free_blocks;
  for (int64_t i = 0; i < num_blocks; ++i) free_blocks.push_back(static_cast<int32_t>(i));
  for (size_t i = free_blocks.size(); i > 1; --i) {
    std::swap(free_blocks[i - 1], free_blocks[static_cast<size_t>(random.below(static_cast<int64_t>(i)))]);
  }
  std::vector<std::vector<int32_t>> tables;
  for (const Span& span : c.spans) {
    tables.emplace_back();
    for (int64_t p = 0; p < span.end; p += c.block_size) {
      tables.back().push_back(free_blocks.back());
      free_blocks.pop_back();
    }
  }
  const HostStep step(c.spans, tables, c.block_size, c.first_position);
  const int64_t tokens = step.index.num_tokens;

  // The cache holds what earlier steps left; everything else in it is NaN.
  const int64_t num_slots = num_blocks * c.block_size;
  Floats cache(static_cast<size_t>(num_slots * latent_dim), std::nanf(""));
  for (size_t s = 0; s < c.spans.size(); ++s) {
    for (int64_t p = c.first_position; p < c.spans[s].begin; ++p) {
      const int64_t slot = tables[s][static_cast<size_t>(p / c.block_size)] * c.block_size + p % c.block_size;
      for (int64_t i = 0; i < latent_dim; ++i) {
        cache[static_cast<size_t>(slot * latent_dim + i)] = float_of_bf16(bf16_of_float(random.normal()));
      }
    }
  }
  Floats q = random_floats(random, tokens * heads_qk, 1), kv = random_floats(random, tokens * latent_dim, 1);
  round_to_bf16(q);
  round_to_bf16(kv);
  const Floats unrotated = q;
  Floats angles(static_cast<size_t>(tokens * c.rope_dim));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < c.rope_dim / 2; ++i) {
      const float angle = random.uniform() * 6;
      angles[static_cast<size_t>(t * c.rope_dim + i)] = std::cos(angle);
      angles[static_cast<size_t>(t * c.rope_dim + c.rope_dim / 2 + i)] = std::sin(angle);
    }
  }

  DeviceCache device_cache(*gpu, c.cache_dtype, cache, num_slots, latent_dim);
  const DeviceMatrix device_q(*gpu, q, tokens, heads_qk, Dtype::kBF16);
  DeviceMatrix unrotated_q(*gpu, q, tokens, heads_qk, Dtype::kBF16);
  const DeviceMatrix device_kv(*gpu, kv, tokens, latent_dim, Dtype::kBF16);
  const DeviceMatrix device_angles(*gpu, angles, tokens, c.rope_dim, Dtype::kF32);
  const StepIndex index = gpu->begin_step(step.index, 0);
  gpu->mla_rope_store(device_q, device_kv, placed, 1e-6f, device_angles, index, device_cache.layer());
  const Tensor cache_tensor = host_tensor(cache, num_slots, latent_dim);
  reference.mla_rope_store(host_tensor(q, tokens, heads_qk), host_tensor(kv, tokens, latent_dim), mla, 1e-6f,
                           host_tensor(angles, tokens, c.rope_dim), step.index, {cache_tensor});
  check_near(device_q.get(), q, kBf16Tolerance, "rotated queries");
  Floats written, wanted_rows;
  const Floats cache_after = device_cache.get();
  for (const int32_t slot : step.slots) {
    for (int64_t i = 0; i < latent_dim; ++i) {
      written.push_back(cache_after[static_cast<size_t>(slot * latent_dim + i)]);
      wanted_rows.push_back(cache[static_cast<size_t>(slot * latent_dim + i)]);
    }
  }
  // e4m3 keeps four bits: an error of a sixteenth at most, about 2.6 % on average.
  check_near(written, wanted_rows, is_fp8 ? 3.5e-2 : kBf16Tolerance, "cache rows");

  const std::vector<uint8_t> cache_bytes = device_cache.raw();

  // The same inputs for both from here on.
  cache = cache_after;
  q = device_q.get();
  // Prompts see quantised latents.
  for (size_t seq = 0; seq < c.spans.size() && !c.is_deterministic && !is_fp8; ++seq) {
    if (c.spans[seq].end - c.spans[seq].begin < kPromptTokens) continue;
    for (const int32_t block : tables[seq]) {
      for (int64_t slot = block * c.block_size; slot < (block + 1) * c.block_size; ++slot)
        quantize_latents(cache.data() + slot * latent_dim, c.lora_rank);
    }
  }
  Floats wanted(static_cast<size_t>(tokens * c.num_heads * c.v_dim));
  reference.mla_attention(host_tensor(q, tokens, heads_qk), mla, step.index,
                          {host_tensor(cache, num_slots, latent_dim)},
                          host_tensor(wanted, tokens, c.num_heads * c.v_dim));
  const DeviceMatrix out(*gpu, tokens, c.num_heads * c.v_dim, Dtype::kBF16);
  gpu->mla_attention(device_q, placed, index, device_cache.layer(), out);
  // q_latent, the weights of the softmax and the output latent are rounded to bf16 on the way.
  check_near(out.get(), wanted, 2 * kBf16Tolerance, "attention");
  if (!c.is_deterministic) return;

  // Each sequence alone, and its last rows one by one.
  const std::vector<uint8_t> bits = out.raw();
  const int64_t row_bytes = c.num_heads * c.v_dim * 2;
  const auto check_part = [&](size_t s, Span part, const std::string& what) {
    const HostStep own({part}, {tables[s]}, c.block_size, c.first_position);
    const int64_t first = step.q_start[s] + part.begin - c.spans[s].begin, count = part.end - part.begin;
    const DeviceMatrix own_out(*gpu, count, c.num_heads * c.v_dim, Dtype::kBF16);
    const StepIndex own_index = gpu->begin_step(own.index, 1);
    gpu->mla_attention(device_q.tensor().slice_rows(first, count), placed, own_index, device_cache.layer(),
                       own_out);
    check_same_bits(own_out.raw(),
                    {bits.begin() + first * row_bytes, bits.begin() + (first + count) * row_bytes},
                    what + " of sequence " + std::to_string(s));
    // In one call, which writes the same cache rows once more.
    const DeviceMatrix joined_out(*gpu, count, c.num_heads * c.v_dim, Dtype::kBF16);
    gpu->mla_store_and_attend(
        unrotated_q.tensor().slice_rows(first, count), device_kv.tensor().slice_rows(first, count), placed,
        1e-6f, device_angles.tensor().slice_rows(first, count), own_index, device_cache.layer(), joined_out);
    check_same_bits(joined_out.raw(), own_out.raw(), "stored and attended, " + what);
    CHECK(device_cache.raw() == cache_bytes);
    unrotated_q.set(unrotated);
  };
  for (size_t s = 0; s < c.spans.size(); ++s) {
    const Span& span = c.spans[s];
    check_part(s, span, "all rows");
    check_part(s, {span.end - 1, span.end}, "the last row");
    if (span.end - span.begin > 2) check_part(s, {span.begin + 1, span.begin + 2}, "the second row");
    if (span.end - span.begin > 20) check_part(s, {span.begin + 5, span.begin + 20}, "a chunk");
  }
}

const bool attention_tests = [] {
  const Dtype fp8 = Dtype::kF8E4M3, bf16 = Dtype::kBF16;
  std::vector<AttentionCase> cases;
  using Spans = std::vector<Span>;
  // V3's and Moonlight's heads; pocket-r1's.
  const auto add = [&](std::string name, int64_t heads, Spans spans, int64_t block_size = 64,
                       int64_t first_position = 0, Dtype cache_dtype = Dtype::kBF16,
                       bool is_deterministic = true) {
    cases.push_back({std::move(name), heads, 128, 64, 128, 512, fp8, std::move(spans), block_size,
                     first_position, true, cache_dtype, is_deterministic});
  };
  const auto add_pocket = [&](std::string name, Spans spans, Dtype cache_dtype = Dtype::kBF16,
                              bool is_deterministic = true) {
    cases.push_back({std::move(name), 4, 64, 64, 64, 512, fp8, std::move(spans), 16, 1, true, cache_dtype,
                     is_deterministic});
  };
  const Spans decodes = {{2500, 2501}, {1023, 1024}, {1024, 1025}, {63, 64}, {0, 1}};
  const Spans mtp = {{1, 40}, {100, 101}, {200, 230}};
  add("V3 heads", 128, {{290, 291}, {64, 65}, {0, 1}, {30, 33}});
  add("Moonlight decode", 16, decodes);
  add("verify steps of 2 to 5 tokens", 16,
      {{1022, 1025}, {63, 68}, {127, 129}, {0, 4}, {300, 301}, {61, 64}});
  add("40 heads, two tokens", 40, {{190, 192}, {255, 257}, {40, 41}}, 32);
  add("one head, blocks of 8", 1, {{100, 105}, {1, 2}, {70, 71}}, 8, 1);
  add("long contexts", 16, {{9000, 9001}, {4095, 4097}});
  add_pocket("pocket-r1, MTP's first position", mtp);
  cases.push_back({"Moonlight prefill over split sizes",
                   16,
                   128,
                   64,
                   128,
                   512,
                   bf16,
                   {{1000, 1060}, {0, 130}, {700, 701}},
                   64});
  cases.push_back({"20 heads of 192 and 256", 20, 192, 64, 256, 512, fp8, {{129, 130}, {5, 8}}, 16});
  cases.push_back(
      {"odd sizes f16", 5, 24, 16, 40, 96, Dtype::kF16, {{0, 33}, {70, 71}, {16, 17}}, 16, 0, false});
  cases.push_back({"odd sizes fp8", 3, 40, 24, 56, 144, fp8, {{0, 50}, {129, 130}}, 7});
  cases.push_back({"odd sizes f32", 2, 32, 8, 24, 81, Dtype::kF32, {{3, 20}, {129, 130}}, 16});

  add("V3 heads, FP8 cache", 128, {{290, 291}, {64, 65}, {0, 1}}, 64, 0, fp8);
  Spans verify = decodes;
  verify.push_back({77, 80});
  add("decode, FP8 cache", 16, verify, 64, 0, fp8);
  add("long contexts, FP8 cache", 16, {{9000, 9001}, {4095, 4097}}, 64, 0, fp8);
  add("3 heads, FP8 cache, blocks of 7", 3, {{65, 70}, {20, 21}}, 7, 1, fp8);
  add_pocket("prefill, FP8 cache", mtp, fp8);

  add("one sequence, spread", 16, {{1000, 1001}}, 64, 0, bf16, false);
  add("one sequence of 3000, spread", 16, {{3000, 3004}}, 64, 0, bf16, false);
  add("128 heads, blocks of 16, spread", 128, {{190, 192}, {1100, 1101}, {15, 18}}, 16, 0, bf16, false);
  add("six sequences, spread, FP8 cache", 16,
      {{1500, 1501}, {4500, 4501}, {30, 31}, {640, 641}, {2048, 2049}, {0, 1}}, 64, 0, fp8, false);
  add("prompts and a prefix", 16, {{0, 300}, {77, 78}, {100, 200}, {5, 20}}, 64, 0, bf16, false);
  cases.push_back(
      {"prompts, FP8 cache", 6, 128, 64, 128, 512, fp8, {{130, 260}, {0, 65}}, 16, 0, false, fp8, false});
  add_pocket("prompts of pocket-r1, MTP", {{1, 140}, {257, 400}}, bf16, false);
  for (const AttentionCase& c : cases) add_cuda_test("attention, " + c.name, [c] { check_attention(c); });
  // So many tiles that nobody splits them: rows are written without a sum of splits.
  AttentionCase whole = {
      "132 sequences of one length, spread", 4, 64, 64, 64, 512, fp8, {}, 64, 0, true, bf16, false};
  for (int64_t i = 0; i < 132; ++i) whole.spans.push_back({300, 301});
  AttentionCase whole_heads = {
      "66 sequences of 128 heads, spread", 128, 16, 64, 16, 512, fp8, {}, 64, 0, true, bf16, false};
  for (int64_t i = 0; i < 66; ++i) whole_heads.spans.push_back({150, 151});
  for (AttentionCase c : {whole, whole_heads}) {
    for (const Dtype dtype : {bf16, fp8}) {
      c.cache_dtype = dtype;
      const std::string name = "attention, " + c.name + (dtype == fp8 ? ", FP8 cache" : "");
      add_cuda_test(name, [c] { check_attention(c); });
    }
  }
  // As many tiles as have the largest splits, more than there are blocks.
  AttentionCase many = {"150 sequences", 4, 64, 64, 64, 512, fp8, {}, 64, 0, true, bf16, false};
  for (int64_t i = 0; i < 150; ++i) many.spans.push_back({7 * i % 400, 7 * i % 400 + 1});
  for (const Dtype dtype : {bf16, fp8}) {
    many.cache_dtype = dtype;
    const std::string name = "attention, " + many.name + (dtype == fp8 ? ", FP8 cache" : "");
    add_cuda_test(name, [many] { check_attention(many); });
  }
  return true;
}();

}  // namespace
}  // namespace rodin::test
