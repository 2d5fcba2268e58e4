// Reading a checkpoint: the spec's checks, rotary frequencies, and what the tensor table refuses.
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "model/rope.h"
#include "model/tensor_table.h"
#include "model/weights.h"
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

ModelSpec v3_spec() {
  ModelSpec spec;
  spec.model_type = "deepseek_v3";
  spec.vocab_size = 129280;
  spec.hidden_size = 7168;
  spec.intermediate_size = 18432;
  spec.moe_intermediate_size = 2048;
  spec.num_hidden_layers = 61;
  spec.num_attention_heads = 128;
  spec.num_shared_experts = 1;
  spec.num_routed_experts = 256;
  spec.num_experts_per_token = 8;
  spec.num_expert_groups = 8;
  spec.topk_groups = 4;
  spec.topk_method = "noaux_tc";
  spec.scoring_func = "sigmoid";
  spec.norm_topk_prob = true;
  spec.routed_scaling_factor = 2.5;
  spec.first_k_dense_replace = 3;
  spec.kv_lora_rank = 512;
  spec.q_lora_rank = 1536;
  spec.qk_nope_head_dim = 128;
  spec.qk_rope_head_dim = 64;
  spec.v_head_dim = 128;
  spec.max_position_embeddings = 163840;
  spec.num_mtp_layers = 1;
  spec.weight_block_rows = 128;
  spec.weight_block_cols = 128;
  spec.yarn = YarnScaling{40, 32, 1, 1, 1, 4096};
  return spec;
}

TEST("check_spec takes DeepSeek-V3 and names what is wrong") {
  check_spec(v3_spec());
  const auto with = [](auto change) {
    ModelSpec spec = v3_spec();
    change(spec);
    check_spec(spec);
  };
  CHECK_THROWS(with([](ModelSpec& s) { s.model_type = "qwen3"; }), "model_type 'qwen3'");
  CHECK_THROWS(with([](ModelSpec& s) { s.hidden_size = 0; }), "hidden_size is 0");
  CHECK_THROWS(with([](ModelSpec& s) { s.kv_lora_rank = -5; }), "kv_lora_rank is -5");
  CHECK_THROWS(with([](ModelSpec& s) { s.qk_rope_head_dim = 63; }), "odd");
  CHECK_THROWS(with([](ModelSpec& s) { s.rms_norm_eps = std::nan(""); }), "rms_norm_eps");
  CHECK_THROWS(with([](ModelSpec& s) { s.rope_theta = 0; }), "rope_theta");
  CHECK_THROWS(with([](ModelSpec& s) { s.num_experts_per_token = 257; }), "num_experts_per_tok is 257");
  CHECK_THROWS(with([](ModelSpec& s) { s.num_expert_groups = 7; }), "n_group (7)");
  const auto single = [](ModelSpec& s) { s.num_expert_groups = 256, s.topk_groups = 8; };
  CHECK_THROWS(with(single), "noaux_tc needs at least two");
  CHECK_THROWS(with([](ModelSpec& s) { s.topk_method = "random"; }), "topk_method 'random'");
  CHECK_THROWS(with([](ModelSpec& s) { s.scoring_func = "tanh"; }), "scoring_func 'tanh'");
  CHECK_THROWS(with([](ModelSpec& s) { s.weight_block_cols = 0; }), "weight_block_size");
  CHECK_THROWS(with([](ModelSpec& s) { s.moe_layer_freq = 0; }), "moe_layer_freq");
  with([](ModelSpec& s) {
    s.num_routed_experts = 0;
    s.moe_intermediate_size = 0;
  });
}

TEST("which layers are MoE layers") {
  ModelSpec spec = v3_spec();
  CHECK(!spec.is_moe_layer(2));
  CHECK(spec.is_moe_layer(3));
  CHECK(spec.is_moe_layer(61));  // the MTP module
  spec.moe_layer_freq = 2;
  CHECK(!spec.is_moe_layer(3));
  CHECK(spec.is_moe_layer(4));
  CHECK(spec.is_moe_layer(61));
  spec.num_routed_experts = 0;
  CHECK(!spec.is_moe_layer(4) && !spec.is_moe_layer(61));
}

TEST("YaRN frequencies and scales: values worked out apart from this program") {
  ModelSpec spec = v3_spec();
  const RopeFrequencies rope = rope_frequencies(spec);
  CHECK_EQ(rope.inv_freq.size(), size_t{32});
  const std::vector<std::pair<size_t, double>> expected = {
      {0, 1.00000000},      {10, 0.0562341325},    {11, 0.0390069266},     {16, 0.00550000000},
      {22, 0.000177827941}, {23, 0.0000333380358}, {31, 0.00000333380358},
  };
  for (const auto& [i, value] : expected) CHECK_CLOSE(rope.inv_freq[i], value, 4e-7 * value);
  CHECK_EQ(rope.multiplier, 1.0f);
  CHECK_CLOSE(softmax_scale(spec), 0.1352337788608801, 1e-8);
  spec.yarn = YarnScaling{16, 32, 1, 0.9, 0.6, 4096};
  CHECK_CLOSE(rope_frequencies(spec).multiplier, 1.0713141698786992, 1e-6);
  spec.yarn.reset();
  CHECK_CLOSE(rope_frequencies(spec).inv_freq[16], 0.01, 1e-8);
  CHECK_CLOSE(softmax_scale(spec), 1 / std::sqrt(192.0), 1e-8);
}

// A shard on disk, deleted with the object.
struct Shard {
  std::string path;
  std::vector<TensorEntry> entries;
  std::vector<char> bytes;
  Shard() : bytes(13, 'x') {  // an odd start, as after a header
    char name[] = "/tmp/rodin-shard-XXXXXX";
    const int file = mkstemp(name);
    CHECK(file >= 0);
    fclose(fdopen(file, "w"));
    path = name;
  }
  ~Shard() { remove(path.c_str()); }
  void add(const std::string& name, const std::string& dtype, std::vector<int64_t> shape,
           const std::string& data) {
    entries.push_back({name, dtype, std::move(shape), path, static_cast<int64_t>(bytes.size()),
                       static_cast<int64_t>(data.size())});
    bytes.insert(bytes.end(), data.begin(), data.end());
  }
  void write() const {
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  }
};

std::string floats(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

TEST("TensorTable: matrices, vectors and block scales") {
  Shard shard;
  shard.add("w", "F8_E4M3", {3, 5}, std::string(15, '\x38'));
  shard.add("w_scale_inv", "F32", {2, 2}, floats({1, 2, 3, 4}));
  shard.add("v", "BF16", {2}, std::string("\x80\x3f\x00\xc0", 4));
  shard.add("h", "F16", {1, 2}, std::string("\x00\x3c\x00\x40", 4));
  shard.write();
  TensorTable table(shard.entries, 2, 3);
  const Weight w = table.matrix("w", 3, 5);
  CHECK_EQ(w.scale_cols(), int64_t{2});
  CHECK_EQ(w.scale[3], 4.0f);
  CHECK_EQ(static_cast<const char*>(w.data)[14], '\x38');
  const float* v = table.vector("v", 2);
  CHECK_EQ(v[0], 1.0f);
  CHECK_EQ(v[1], -2.0f);
  CHECK_EQ(element_as_float(table.matrix("h", 1, 2).data, Dtype::kF16, 1), 2.0f);
  std::atomic<int64_t> loaded{0};
  table.make_resident(loaded, 3);
  CHECK_EQ(loaded.load(), int64_t{15 + 16 + 4 + 4});

  CHECK_THROWS(table.matrix("w", 5, 3), "tensor w has shape [3, 5]; config.json asks for [5, 3]");
  CHECK_THROWS(table.vector("v", 3), "tensor v has shape [2]");
  CHECK_THROWS(table.matrix("nothing", 1, 1), "no tensor nothing");
  CHECK_THROWS(TensorTable(shard.entries, 0, 0).matrix("w", 3, 5), "weight_block_size");
  CHECK_THROWS(TensorTable(shard.entries, 1, 3).matrix("w", 3, 5), "w_scale_inv has shape [2, 2]");
}

TEST("TensorTable: entries that do not fit their file are refused before anything is read") {
  Shard shard;
  shard.add("a", "F32", {2, 2}, floats({1, 2, 3, 4}));
  shard.add("b", "F32", {1}, floats({5}));
  shard.write();
  const auto with = [&](auto change) {
    std::vector<TensorEntry> entries = shard.entries;
    change(entries);
    const TensorTable table(entries, 0, 0);
  };
  CHECK_THROWS(with([](auto& e) { e[1].offset += 1; }), "tensor b ends at byte");
  CHECK_THROWS(with([](auto& e) { e[1].offset = -4; }), "tensor b ends at byte");
  CHECK_THROWS(with([](auto& e) { e[1].offset = INT64_MAX; }), "tensor b ends at byte");
  CHECK_THROWS(with([](auto& e) { e[0].bytes = 15; }), "cannot take 15 bytes");
  CHECK_THROWS(with([](auto& e) { e[0].shape = {int64_t{1} << 40, int64_t{1} << 40}; }), "cannot take");
  CHECK_THROWS(with([](auto& e) { e[0].shape = {-2, -2}; }), "cannot take");
  CHECK_THROWS(with([](auto& e) { e[0].dtype = "I64"; }), "'I64' is not supported");
  CHECK_THROWS(with([](auto& e) { e[1].name = "a"; }), "occurs twice");
  CHECK_THROWS(with([](auto& e) { e[1].file = "/nowhere/model.safetensors"; }), "cannot open /nowhere");
  std::ofstream(shard.path, std::ios::trunc).flush();
  CHECK_THROWS(with([](auto&) {}), "is empty");
}

TEST("TensorTable: an FP8 weight with a NaN is refused while loading") {
  Shard shard;
  shard.add("good", "F8_E4M3", {4}, "abcd");
  shard.add("bad", "F8_E4M3", {4},
            std::string("ab\xff"
                        "d"));
  shard.write();
  TensorTable table(shard.entries, 1, 1);
  std::atomic<int64_t> loaded{0};
  CHECK_THROWS(table.make_resident(loaded, 2), "tensor bad holds a NaN");
}

TEST("needed_entries leaves out other MTP modules, a tied head and the copied embedding") {
  ModelSpec spec = v3_spec();
  std::vector<TensorEntry> entries;
  for (const char* name : {"model.embed_tokens.weight", "model.layers.0.x", "model.layers.60.x",
                           "model.layers.61.x", "model.layers.61.embed_tokens.weight", "model.layers.62.x",
                           "model.layers.99999999999999999999.x", "lm_head.weight"}) {
    TensorEntry entry;
    entry.name = name;
    entries.push_back(entry);
  }
  CHECK_EQ(needed_entries(spec, entries, false).size(), size_t{4});
  CHECK_EQ(needed_entries(spec, entries, true).size(), size_t{5});
  spec.tie_word_embeddings = true;
  CHECK_EQ(needed_entries(spec, entries, true).size(), size_t{4});
}

}  // namespace
}  // namespace rodin::test
