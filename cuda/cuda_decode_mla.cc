// The attention half of a layer in three launches, for steps of a few tokens (decode_enter.cu, the attention
// kernel, decode_leave.cu).
#include "cuda/cuda_ops_impl.h"
#include "cuda/decode_mla.h"

namespace rodin::cuda {

bool CudaOps::mla_joined(const Tensor& x, const PendingNorm* norm, const MlaWeights& mla, float eps,
                         const Tensor& rope_table, const StepIndex& index, const CacheLayer& cache,
                         const Tensor& q, const Tensor& kv, const Tensor& attention, const Tensor& out) {
  const Step& step = step_of(index);
  const std::vector<MlaChunk>& chunks = step.plan.chunks;
  if (!step.prefill.tiles.empty() || chunks.size() != 1 || chunks[0].num_tokens != index.num_tokens)
    return false;
  if (is_splitting(view_of(mla.q_b), x.rows, false) || is_splitting(view_of(mla.o), x.rows, false))
    return false;

  const DecodeEnterParams enter = {
      .rows = {.weight = {view_of(mla.q_b), view_of(mla.kv_a)}, .io = {io_of(x, q), io_of(x, kv)}},
      .norm =
          norm != nullptr ? norm_params(norm->residual, nullptr, norm->weight, norm->eps, x) : NormParams{},
      .enter = enter_params(q, kv, mla, eps, rope_table, index, cache),
      .arrivals = arrivals_,
      .exchange = arrivals_ + 2,
      .num_multiprocessors = num_multiprocessors_};
  const MlaParams params = mla_params(q, mla.shape, index, cache, step, chunks[0]);
  const DecodeLeaveParams leave = {
      .leave = leave_params(params, mla, attention),
      .rows = {.weight = {view_of(mla.o), {}}, .io = {io_of(attention, out), {}}},
      .arrivals = arrivals_ + 1,
      .exchange = arrivals_ + 2 + kExchangeWords,
      .num_multiprocessors = num_multiprocessors_};
  if (!is_decode_enter(enter) || !is_decode_leave(leave)) return false;
  run_decode_enter(enter, stream_);
  const int64_t latent_row = mla.shape.num_heads * latent_stride_;
  run_chunk(params, q, {q_latent_, Dtype::kBF16, x.rows, latent_row, latent_row}, cache);
  run_decode_leave(leave, stream_);
  return true;
}

}  // namespace rodin::cuda
