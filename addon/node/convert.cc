#include "node/convert.h"

#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace rodin::node {
namespace {

constexpr double kMaxSafeInteger = 9007199254740991.0;

[[noreturn]] void fail_type(const Napi::Env& env, const std::string& what, const std::string& expected) {
  throw Napi::TypeError::New(env, what + " must be " + expected);
}

// The properties of one object, by name; `path` is how messages call the object.
class Fields {
 public:
  Fields(const Napi::Value& value, std::string path) : path_(std::move(path)), object_(value.Env(), nullptr) {
    if (!value.IsObject() || value.IsArray() || value.IsTypedArray())
      fail_type(value.Env(), path_, "an object");
    object_ = value.As<Napi::Object>();
  }

  Napi::Value value(const char* name) const { return object_.Get(name); }
  std::string path(const char* name) const { return path_ + "." + name; }
  Napi::Env env() const { return object_.Env(); }

  double number(const char* name) const {
    const Napi::Value field = value(name);
    if (!field.IsNumber() || !std::isfinite(field.As<Napi::Number>().DoubleValue())) {
      fail_type(env(), path(name), "a finite number");
    }
    return field.As<Napi::Number>().DoubleValue();
  }

  int64_t count(const char* name) const { return to_count(value(name), path(name)); }

  bool boolean(const char* name) const {
    const Napi::Value field = value(name);
    if (!field.IsBoolean()) fail_type(env(), path(name), "true or false");
    return field.As<Napi::Boolean>().Value();
  }

  std::string text(const char* name) const {
    const Napi::Value field = value(name);
    if (!field.IsString()) fail_type(env(), path(name), "a string");
    return field.As<Napi::String>().Utf8Value();
  }

  Napi::Array array(const char* name) const {
    const Napi::Value field = value(name);
    if (!field.IsArray()) fail_type(env(), path(name), "an array");
    return field.As<Napi::Array>();
  }

  std::vector<int64_t> counts(const char* name) const {
    const Napi::Array values = array(name);
    std::vector<int64_t> out(values.Length());
    for (uint32_t i = 0; i < values.Length(); ++i) {
      out[i] = to_count(values.Get(i), path(name) + "[" + std::to_string(i) + "]");
    }
    return out;
  }

  void copy(const char* name, std::vector<int32_t>& out) const {
    copy_array(name, napi_int32_array, "an Int32Array", out);
  }
  void copy(const char* name, std::vector<uint8_t>& out) const {
    copy_array(name, napi_uint8_array, "a Uint8Array", out);
  }
  void copy(const char* name, std::vector<uint32_t>& out) const {
    copy_array(name, napi_uint32_array, "a Uint32Array", out);
  }
  void copy(const char* name, std::vector<float>& out) const {
    copy_array(name, napi_float32_array, "a Float32Array", out);
  }

 private:
  static int64_t to_count(const Napi::Value& value, const std::string& path) {
    if (!value.IsNumber()) fail_type(value.Env(), path, "a number");
    const double number = value.As<Napi::Number>().DoubleValue();
    if (!(number >= 0 && number <= kMaxSafeInteger) || number != std::floor(number)) {
      fail_type(value.Env(), path, "an integer of at least 0");
    }
    return static_cast<int64_t>(number);
  }

  template <class T>
  void copy_array(const char* name, napi_typedarray_type type, const char* expected,
                  std::vector<T>& out) const {
    const Napi::Value field = value(name);
    if (!field.IsTypedArray() || field.As<Napi::TypedArray>().TypedArrayType() != type) {
      fail_type(env(), path(name), expected);
    }
    const auto array = field.As<Napi::TypedArrayOf<T>>();
    out.assign(array.Data(), array.Data() + array.ElementLength());
  }

  std::string path_;
  Napi::Object object_;
};

TensorEntry to_tensor_entry(const Napi::Value& value, uint32_t index) {
  const Fields fields(value, "options.tensors[" + std::to_string(index) + "]");
  TensorEntry entry;
  entry.name = fields.text("name");
  entry.dtype = fields.text("dtype");
  entry.shape = fields.counts("shape");
  entry.file = fields.text("file");
  entry.offset = fields.count("offset");
  entry.bytes = fields.count("bytes");
  return entry;
}

// Typed arrays that share one ArrayBuffer: making a buffer takes longer than anything else about them.
class SharedArrays {
 public:
  SharedArrays(Napi::Env env, size_t bytes, size_t num_arrays)
      : buffer_(Napi::ArrayBuffer::New(env, bytes + num_arrays * kAlign)) {}

  template <class T>
  Napi::TypedArrayOf<T> copy(const std::vector<T>& values) {
    const auto array = Napi::TypedArrayOf<T>::New(buffer_.Env(), values.size(), buffer_, used_);
    if (!values.empty()) std::memcpy(bytes() + used_, values.data(), values.size() * sizeof(T));
    used_ += (values.size() * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return array;
  }

 private:
  static constexpr size_t kAlign = 8;
  char* bytes() { return static_cast<char*>(buffer_.Data()); }
  Napi::ArrayBuffer buffer_;
  size_t used_ = 0;
};

template <class... T>
size_t bytes_of(const std::vector<T>&... values) {
  return (0 + ... + (values.size() * sizeof(T)));
}

}  // namespace

ModelSpec to_model_spec(const Napi::Value& value) {
  const Fields fields(value, "options.spec");
  ModelSpec spec;
  spec.model_type = fields.text("modelType");
  spec.vocab_size = fields.count("vocabSize");
  spec.hidden_size = fields.count("hiddenSize");
  spec.intermediate_size = fields.count("intermediateSize");
  spec.moe_intermediate_size = fields.count("moeIntermediateSize");
  spec.num_hidden_layers = fields.count("numHiddenLayers");
  spec.num_attention_heads = fields.count("numAttentionHeads");
  spec.num_shared_experts = fields.count("numSharedExperts");
  spec.num_routed_experts = fields.count("numRoutedExperts");
  spec.num_experts_per_token = fields.count("numExpertsPerToken");
  spec.num_expert_groups = fields.count("numExpertGroups");
  spec.topk_groups = fields.count("topkGroups");
  spec.topk_method = fields.text("topkMethod");
  spec.scoring_func = fields.text("scoringFunc");
  spec.norm_topk_prob = fields.boolean("normTopkProb");
  spec.routed_scaling_factor = fields.number("routedScalingFactor");
  spec.first_k_dense_replace = fields.count("firstKDenseReplace");
  spec.moe_layer_freq = fields.count("moeLayerFreq");
  spec.kv_lora_rank = fields.count("kvLoraRank");
  spec.q_lora_rank = fields.count("qLoraRank");
  spec.qk_nope_head_dim = fields.count("qkNopeHeadDim");
  spec.qk_rope_head_dim = fields.count("qkRopeHeadDim");
  spec.v_head_dim = fields.count("vHeadDim");
  spec.num_key_value_heads = fields.count("numKeyValueHeads");
  spec.head_dim = fields.count("headDim");
  spec.attention_bias = fields.boolean("attentionBias");
  spec.mlp_bias = fields.boolean("mlpBias");
  spec.max_position_embeddings = fields.count("maxPositionEmbeddings");
  spec.rms_norm_eps = fields.number("rmsNormEps");
  spec.rope_theta = fields.number("ropeTheta");
  spec.rope_interleave = fields.boolean("ropeInterleave");
  if (!fields.value("yarn").IsNull()) {
    const Fields yarn(fields.value("yarn"), "options.spec.yarn");
    spec.yarn = YarnScaling{.factor = yarn.number("factor"),
                            .beta_fast = yarn.number("betaFast"),
                            .beta_slow = yarn.number("betaSlow"),
                            .mscale = yarn.number("mscale"),
                            .mscale_all_dim = yarn.number("mscaleAllDim"),
                            .original_max_position_embeddings = yarn.number("originalMaxPositionEmbeddings")};
  }
  if (!fields.value("llama3").IsNull()) {
    const Fields llama3(fields.value("llama3"), "options.spec.llama3");
    spec.llama3 =
        Llama3Scaling{.factor = llama3.number("factor"),
                      .low_freq_factor = llama3.number("lowFreqFactor"),
                      .high_freq_factor = llama3.number("highFreqFactor"),
                      .original_max_position_embeddings = llama3.number("originalMaxPositionEmbeddings")};
  }
  spec.rope_linear_factor = fields.number("ropeLinearFactor");
  spec.tie_word_embeddings = fields.boolean("tieWordEmbeddings");
  spec.num_mtp_layers = fields.count("numMtpLayers");
  if (!fields.value("weightBlockSize").IsNull()) {
    const std::vector<int64_t> block = fields.counts("weightBlockSize");
    if (block.size() != 2) fail_type(fields.env(), fields.path("weightBlockSize"), "null or [rows, columns]");
    spec.weight_block_rows = block[0];
    spec.weight_block_cols = block[1];
  }
  return spec;
}

RunnerOptions to_runner_options(const Napi::Value& value) {
  const Fields fields(value, "options");
  RunnerOptions options;
  options.spec = to_model_spec(fields.value("spec"));
  options.device = fields.text("device");
  options.compute = fields.text("compute");
  options.cpu_path = fields.text("cpuPath");
  options.num_threads = fields.count("numThreads");
  options.block_size = fields.count("blockSize");
  options.num_blocks = fields.count("numBlocks");
  options.memory_utilization = fields.number("gpuMemoryUtilization");
  options.kv_cache_dtype = fields.text("kvCacheDtype");
  options.head_dtype = fields.text("headDtype");
  options.is_deterministic = fields.boolean("deterministic");
  options.max_step_tokens = fields.count("maxStepTokens");
  options.max_num_seqs = fields.count("maxNumSeqs");
  options.load_mtp = fields.boolean("loadMtp");
  const Napi::Array tensors = fields.array("tensors");
  options.tensors.reserve(tensors.Length());
  for (uint32_t i = 0; i < tensors.Length(); ++i) {
    const Napi::HandleScope scope(fields.env());
    options.tensors.push_back(to_tensor_entry(tensors.Get(i), i));
  }
  return options;
}

CacheOptions to_cache_options(const Napi::Value& value) {
  const Fields fields(value, "options");
  CacheOptions options;
  options.spec = to_model_spec(fields.value("spec"));
  options.compute = fields.text("compute");
  options.device = fields.text("device");
  options.kv_cache_dtype = fields.text("kvCacheDtype");
  options.load_mtp = fields.boolean("loadMtp");
  return options;
}

BackendOptions to_backend_options(const Napi::Value& value) {
  const Fields fields(value, "options");
  const int64_t num_threads = fields.count("numThreads");
  if (num_threads < 1 || num_threads > 1024) fail_type(fields.env(), fields.path("numThreads"), "1 to 1024");
  return {fields.text("device"), fields.text("compute"), fields.text("cpuPath"),
          static_cast<int>(num_threads), fields.text("kvCacheDtype")};
}

OpCase to_op_case(const Napi::Value& value) {
  const Fields fields(value, "options");
  OpCase op_case;
  const std::string op = fields.text("op"), dtype = fields.text("dtype");
  if (op == "norm") {
    op_case.op = BenchedOp::kNorm;
  } else if (op == "linear") {
    op_case.op = BenchedOp::kLinear;
  } else if (op == "moe") {
    op_case.op = BenchedOp::kMoe;
  } else if (op == "attention") {
    op_case.op = BenchedOp::kAttention;
  } else {
    fail_type(fields.env(), fields.path("op"), "norm, linear, moe or attention");
  }
  if (dtype == "F8_E4M3") {
    op_case.dtype = Dtype::kF8E4M3;
  } else if (dtype != "BF16") {
    fail_type(fields.env(), fields.path("dtype"), "F8_E4M3 or BF16");
  }
  op_case.num_tokens = fields.count("numTokens");
  op_case.rows = fields.count("rows");
  op_case.cols = fields.count("cols");
  op_case.context = fields.count("context");
  op_case.min_seconds = fields.number("minSeconds");
  op_case.spec = to_model_spec(fields.value("spec"));
  return op_case;
}

StepBatch to_step_batch(const Napi::Value& value) {
  const Fields fields(value, "batch");
  StepBatch batch;
  fields.copy("tokenIds", batch.token_ids);
  fields.copy("positions", batch.positions);
  fields.copy("slotMapping", batch.slot_mapping);
  fields.copy("qStart", batch.q_start);
  fields.copy("blockTableStart", batch.block_table_start);
  fields.copy("blockTable", batch.block_table);
  fields.copy("numSampled", batch.num_sampled);
  fields.copy("runMtp", batch.run_mtp);
  fields.copy("numDrafts", batch.num_drafts);
  fields.copy("temperature", batch.temperature);
  fields.copy("topP", batch.top_p);
  fields.copy("topK", batch.top_k);
  fields.copy("minP", batch.min_p);
  fields.copy("seedLow", batch.seed_low);
  fields.copy("seedHigh", batch.seed_high);
  fields.copy("presencePenalty", batch.presence_penalty);
  fields.copy("frequencyPenalty", batch.frequency_penalty);
  fields.copy("repetitionPenalty", batch.repetition_penalty);
  fields.copy("numLogprobs", batch.num_logprobs);
  fields.copy("historyStart", batch.history_start);
  fields.copy("historyIds", batch.history_ids);
  fields.copy("historyCounts", batch.history_counts);
  fields.copy("biasStart", batch.bias_start);
  fields.copy("biasIds", batch.bias_ids);
  fields.copy("biasValues", batch.bias_values);
  fields.copy("maskStart", batch.mask_start);
  fields.copy("masks", batch.masks);
  fields.copy("logitRows", batch.logit_rows);
  fields.copy("draftLogitRows", batch.draft_logit_rows);
  return batch;
}

Napi::Object from_op_timing(Napi::Env env, const OpTiming& timing) {
  Napi::Array micros = Napi::Array::New(env, timing.micros.size());
  for (uint32_t i = 0; i < timing.micros.size(); ++i) micros.Set(i, timing.micros[i]);
  Napi::Object object = Napi::Object::New(env);
  object.Set("micros", micros);
  object.Set("relativeError", timing.relative_error);
  object.Set("copies", static_cast<double>(timing.copies));
  return object;
}

Napi::Object from_runner_info(Napi::Env env, const RunnerInfo& info) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("device", info.device);
  object.Set("numBlocks", static_cast<double>(info.num_blocks));
  object.Set("weightBytes", static_cast<double>(info.weight_bytes));
  object.Set("cacheBytes", static_cast<double>(info.cache_bytes));
  object.Set("workspaceBytes", static_cast<double>(info.workspace_bytes));
  return object;
}

Napi::Object from_step_result(Napi::Env env, const StepResult& result) {
  Napi::Object object = Napi::Object::New(env);
  SharedArrays arrays(env,
                      bytes_of(result.sampled_ids, result.sampled_logprobs, result.top_start, result.top_ids,
                               result.top_logprobs, result.non_finite, result.logits, result.draft_logits,
                               result.draft_start, result.draft_ids),
                      10);
  object.Set("sampledIds", arrays.copy(result.sampled_ids));
  object.Set("sampledLogprobs", arrays.copy(result.sampled_logprobs));
  object.Set("topStart", arrays.copy(result.top_start));
  object.Set("topIds", arrays.copy(result.top_ids));
  object.Set("topLogprobs", arrays.copy(result.top_logprobs));
  object.Set("nonFinite", arrays.copy(result.non_finite));
  object.Set("logits", arrays.copy(result.logits));
  object.Set("draftLogits", arrays.copy(result.draft_logits));
  object.Set("draftStart", arrays.copy(result.draft_start));
  object.Set("draftIds", arrays.copy(result.draft_ids));
  object.Set("stepMicros", result.step_micros);
  object.Set("draftMicros", result.draft_micros);
  object.Set("deviceMicros", result.device_micros);
  object.Set("idleMicros", result.idle_micros);
  return object;
}

}  // namespace rodin::node
