#include "cuda/cuda_ops.h"

#include <algorithm>
#include <charconv>

#include "cuda/cuda_check.h"
#include "cuda/cuda_ops_impl.h"
#include "cuda/decode_mla.h"
#include "cuda/mla_wgmma.h"

namespace rodin {
namespace {

// Empty, or why the device cannot be used.
std::string reason_against(int device_id) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, device_id);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  if (properties.major == 9 && properties.minor == 0) return "";
  return std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + "; the kernels are built for 9.0 (H100, H200)";
}

std::string no_device_reason(cudaError_t error) {
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver)
    return "no NVIDIA driver is installed, or one older than CUDA 13 needs";
  if (error == cudaErrorNoDevice || error == cudaSuccess) return "the driver sees no GPU";
  return cudaGetErrorString(error);
}

}  // namespace

void list_cuda_devices(std::vector<std::string>& usable,
                       std::vector<std::pair<std::string, std::string>>& unusable) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    unusable.emplace_back("cuda:0", no_device_reason(error));
    return;
  }
  for (int i = 0; i < count; ++i) {
    const std::string device = "cuda:" + std::to_string(i);
    const std::string reason = reason_against(i);
    if (reason.empty()) {
      usable.push_back(device);
    } else {
      unusable.emplace_back(device, reason);
    }
  }
}

std::unique_ptr<Ops> make_cuda_ops(const std::string& device, const std::string& compute, Dtype cache_dtype,
                                   bool is_deterministic) {
  const std::string prefix = "cuda:";
  int device_id = -1;
  const char* end = device.data() + device.size();
  const char* digits = device.data() + std::min(device.size(), prefix.size());
  const auto parsed = std::from_chars(digits, end, device_id);
  check(device.compare(0, prefix.size(), prefix) == 0 && parsed.ec == std::errc() && parsed.ptr == end &&
            device_id >= 0,
        "the device '", device, "' does not exist; use cpu or cuda:0");
  check(compute == "auto", "the compute mode '", compute, "' runs on the CPU alone; use --device cpu");
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  check(error == cudaSuccess && count > 0, "the device ", device,
        " cannot be used: ", no_device_reason(error));
  check(device_id < count, "the device ", device, " does not exist; this machine has ", count, " GPU(s)");
  const std::string reason = reason_against(device_id);
  check(reason.empty(), "the device ", device, " cannot be used: ", reason);
  return std::make_unique<cuda::CudaOps>(device_id, cache_dtype, is_deterministic);
}

}  // namespace rodin

namespace rodin::cuda {
namespace {

// Steps that are worth a recording: they come again and again, and their launches take longer than their
// work.
constexpr int64_t kMaxDecodeRows = 9;  // of a sequence: its token and up to eight drafts
constexpr int64_t kMaxDecodeTokens = 512;

}  // namespace

CudaOps::CudaOps(int device_id, Dtype cache_dtype, bool is_deterministic)
    : device_id_(device_id), cache_dtype_(cache_dtype), is_deterministic_(is_deterministic) {
  RODIN_CUDA(cudaSetDevice(device_id));
  RODIN_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  RODIN_CUDA(cudaDeviceGetAttribute(&num_multiprocessors_, cudaDevAttrMultiProcessorCount, device_id));
  prepare_linear();
  prepare_linear_wgmma();
  prepare_linear_split();
  prepare_mla_prefill();
  prepare_mla();
  prepare_mla_wgmma();
  prepare_decode_enter_one();
  prepare_decode_leave_one();
}

CudaOps::~CudaOps() {
  uploader_.reset();
  if (stream_) {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  release_sample();
}

std::string CudaOps::name() const {
  cudaDeviceProp properties;
  RODIN_CUDA(cudaGetDeviceProperties(&properties, device_id_));
  return "cuda:" + std::to_string(device_id_) + " (" + properties.name + ")";
}

void* CudaOps::alloc(size_t bytes) {
  RODIN_CUDA(cudaSetDevice(device_id_));  // the engine thread may not be the one that made this
  return device_alloc(bytes);
}

void CudaOps::free(void* data) {
  // Called from destructors: an error here (a lost context) has been reported where it happened.
  if (cudaFree(data) != cudaSuccess) cudaGetLastError();
}

void CudaOps::upload(void* device, const void* host, size_t bytes) {
  planned_ids_ = nullptr;  // they may be what is overwritten
  RODIN_CUDA(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_), " of ", bytes, " bytes");
  RODIN_CUDA(cudaStreamSynchronize(stream_));
}

void CudaOps::download(void* host, const void* device, size_t bytes) {
  RODIN_CUDA(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_), " of ", bytes, " bytes");
  RODIN_CUDA(cudaStreamSynchronize(stream_));
}

DeviceMemory CudaOps::memory() const {
  size_t free = 0, total = 0;
  RODIN_CUDA(cudaSetDevice(device_id_));
  RODIN_CUDA(cudaMemGetInfo(&free, &total));
  return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
}

// A large copy within the device, bytes read and bytes written counted both: what speeds are judged by. The
// products are not measured: a program that reaches their ceiling is a larger one than the kernels here.
Ceilings CudaOps::measure_ceilings() {
  constexpr size_t kBytes = size_t{2} << 30;
  constexpr int kCopies = 10;
  void* from = device_alloc(kBytes);
  void* to = device_alloc(kBytes);
  cudaEvent_t begin = nullptr, end = nullptr;
  RODIN_CUDA(cudaEventCreate(&begin));
  RODIN_CUDA(cudaEventCreate(&end));
  RODIN_CUDA(cudaMemsetAsync(from, 0x35, kBytes, stream_));
  float least = 0;  // milliseconds
  for (int i = 0; i < kCopies; ++i) {
    RODIN_CUDA(cudaEventRecord(begin, stream_));
    RODIN_CUDA(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, stream_), " of ", kBytes,
               " bytes");
    RODIN_CUDA(cudaEventRecord(end, stream_));
    RODIN_CUDA(cudaEventSynchronize(end));
    float elapsed = 0;
    RODIN_CUDA(cudaEventElapsedTime(&elapsed, begin, end));
    least = i == 0 ? elapsed : std::min(least, elapsed);
  }
  RODIN_CUDA(cudaEventDestroy(begin));
  RODIN_CUDA(cudaEventDestroy(end));
  RODIN_CUDA(cudaFree(from));
  RODIN_CUDA(cudaFree(to));
  return {2.0 * static_cast<double>(kBytes) / (static_cast<double>(least) * 1e-3), 0};
}

size_t CudaOps::reserve(const OpsLimits& limits) {
  check(!is_reserved_, "the workspace of ", name(), " was reserved already");
  limits_ = limits;
  finish_placing();
  reserve_moe();
  reserve_quantized();
  reserve_split();
  reserve_attention();
  reserve_prefill();
  reserve_sample();
  // Index arrays: seven of a step's tokens, the tiles of attention, the block tables; grown where that is too
  // little.
  const size_t tokens = static_cast<size_t>(limits.max_step_tokens);
  const size_t tables =
      std::min<size_t>(static_cast<size_t>(limits.max_num_seqs * limits.num_blocks), size_t{1} << 20);
  size_t bytes = workspace_.bytes();
  for (Step& step : steps_) {
    step.arrays.begin(tokens * 24 + static_cast<size_t>(limits.max_num_seqs) * 12 + tables * 4 + tokens * 32);
    bytes += step.arrays.capacity();
  }
  for (StepArrays& gather : gathers_) {
    gather.begin(tokens * 4 + 64);
    bytes += gather.capacity();
  }
  is_reserved_ = true;
  return bytes;
}

StepIndex CudaOps::begin_step(const StepIndex& host, int which) {
  check(is_reserved_, "begin_step() needs reserve() first");
  check(host.num_tokens <= limits_.max_step_tokens, "a step of ", host.num_tokens,
        " tokens is larger than the ", limits_.max_step_tokens, " reserved");
  Step& step = steps_[which];
  if (limits_.mla.num_heads > 0) {
    step.prefill.fill(host, kMinPrefillTokens, prefill_keys_);
    step.plan.fill(host, plan_limits_, step.prefill.is_prefill);
  }
  const int64_t tokens = host.num_tokens, seqs = host.num_seqs;
  const int64_t num_tiles = static_cast<int64_t>(step.plan.tiles.size());
  const auto num_prefill_tiles = static_cast<int64_t>(step.prefill.tiles.size());
  const auto num_prefill_keys = static_cast<int64_t>(step.prefill.slots.size());
  const int64_t table_size = host.block_table_start[seqs];
  step.arrays.begin(static_cast<size_t>(
      (5 * tokens + 2 * (seqs + 1) + table_size) * 4 + num_tiles * static_cast<int64_t>(sizeof(MlaTile)) +
      num_prefill_tiles * static_cast<int64_t>(sizeof(PrefillTile)) + num_prefill_keys * 4 + 11 * 16));
  StepIndex index = host;
  index.token_ids = step.arrays.add(host.token_ids, tokens);
  index.rope_positions = step.arrays.add(host.rope_positions, tokens);
  index.cache_positions = step.arrays.add(host.cache_positions, tokens);
  index.slots = step.arrays.add(host.slots, tokens);
  index.seq_of_token = step.arrays.add(host.seq_of_token, tokens);
  index.q_start = step.arrays.add(host.q_start, seqs + 1);
  index.block_table_start = step.arrays.add(host.block_table_start, seqs + 1);
  step.tiles = step.arrays.add(step.plan.tiles.data(), num_tiles);
  step.prefill_tiles = step.arrays.add(step.prefill.tiles.data(), num_prefill_tiles);
  step.prefill_slots = step.arrays.add(step.prefill.slots.data(), num_prefill_keys);
  index.block_table = step.arrays.add(host.block_table, table_size);
  step.arrays.flush(stream_);
  step.q_start = index.q_start;
  step.is_decode = host.max_q_len <= kMaxDecodeRows && tokens <= kMaxDecodeTokens;
  return index;
}

const CudaOps::Step& CudaOps::step_of(const StepIndex& index) const {
  const Step& step = steps_[index.q_start == steps_[0].q_start ? 0 : 1];
  check(index.q_start == step.q_start, "an op was given an index that begin_step() did not make");
  return step;
}

void CudaOps::run_recorded(const StepIndex& index, const std::function<void()>& body) {
  const Step& step = step_of(index);
  if (!step.is_decode) return body();
  // The arrays lie at places that depend on their sizes; the block tables are the last of them.
  StepShape shape = {&step - steps_,       reinterpret_cast<int64_t>(index.token_ids),
                     index.num_tokens,     index.num_seqs,
                     index.first_position, step.plan.tile_rows,
                     step.plan.spread};
  for (const MlaChunk& chunk : step.plan.chunks) {
    shape.insert(shape.end(),
                 {chunk.first_token, chunk.num_tokens, chunk.first_tile, chunk.num_tiles, chunk.max_splits});
  }
  graphs_.run(shape, stream_, body);
}

void CudaOps::rope_table(const StepIndex& index, const RopeParams& params, const Tensor& table) {
  run_rope_table({.positions = index.rope_positions,
                  .inv_freq = params.inv_freq,
                  .multiplier = params.multiplier,
                  .table = table.row<float>(0),
                  .stride = table.stride,
                  .num_tokens = static_cast<int32_t>(index.num_tokens),
                  .half = static_cast<int32_t>(table.cols / 2)},
                 stream_);
}

void CudaOps::embed(const Weight& table, const StepIndex& index, const Tensor& out) {
  run_embed({.table = view_of(table),
             .token_ids = index.token_ids,
             .sampled = outcomes_,
             .out = out.row<float>(0),
             .out_stride = out.stride,
             .num_tokens = static_cast<int32_t>(index.num_tokens)},
            stream_);
}

NormParams CudaOps::norm_params(const Tensor& x, const Tensor* delta, const float* weight, float eps,
                                const Tensor& out) const {
  return {.x = x.data,
          .x_dtype = x.dtype,
          .x_stride = x.stride,
          .delta = delta ? delta->data : nullptr,
          .delta_stride = delta ? delta->stride : 0,
          .weight = weight,
          .eps = eps,
          .out = out.data,
          .out_stride = out.stride,
          .num_rows = static_cast<int32_t>(out.rows),
          .cols = static_cast<int32_t>(x.cols)};
}

void CudaOps::rms_norm(const Tensor& x, const float* weight, float eps, const Tensor& out) {
  run_rms_norm(norm_params(x, nullptr, weight, eps, out), stream_);
}

void CudaOps::add_rms_norm(const Tensor& residual, const Tensor& delta, const float* weight, float eps,
                           const Tensor& out) {
  run_rms_norm(norm_params(residual, &delta, weight, eps, out), stream_);
}

void CudaOps::gather_rows(const Tensor& from, const int32_t* rows, const Tensor& to) {
  if (to.rows == 0) return;
  StepArrays& arrays = gathers_[next_gather_];
  next_gather_ = (next_gather_ + 1) % 4;
  arrays.begin(static_cast<size_t>(to.rows) * 4 + 16);
  const int32_t* device_rows = arrays.add(rows, to.rows);
  arrays.flush(stream_);
  const int64_t element = dtype_bytes(from.dtype);
  run_gather_rows({.from = from.data,
                   .from_row_bytes = from.stride * element,
                   .rows = device_rows,
                   .to = to.data,
                   .to_row_bytes = to.stride * element,
                   .row_bytes = to.cols * element,
                   .num_rows = static_cast<int32_t>(to.rows)},
                  stream_);
}

}  // namespace rodin::cuda
