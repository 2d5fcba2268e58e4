// The MTP module: one more decoder layer over concat(norm of the next token's embedding, norm of the hidden
// state). Its cache is shifted by one: the entry made from (token j, hidden j-1) is rotated by position j-1
// and lies in the slot of token j, so that a block depends on its own tokens and those before it alone.
#include "model/forward.h"
#include "model/mla.h"

namespace rodin {

Tensor Forward::run_mtp(const StepIndex& index, const Tensor& hidden, const int32_t* hidden_rows,
                        const CacheLayer& cache) {
  const ForwardBuffers at = buffers_.first_rows(index.num_tokens);
  const MtpWeights& mtp = *weights_.mtp;
  // The rows come from the host, which a recording must not read.
  ops_.gather_rows(hidden, hidden_rows, at.delta);
  ops_.run_recorded(index, [&] {
    join_mtp_input(index, at);
    attention(mtp.layer, true, index, cache, at);
    mlp(mtp.layer, mtp.head_norm, false, at, at.normed);
  });
  return at.normed;
}

void Forward::store_mtp(const StepIndex& index, const Tensor& hidden, const int32_t* hidden_rows,
                        const CacheLayer& cache) {
  const ForwardBuffers at = buffers_.first_rows(index.num_tokens);
  ops_.gather_rows(hidden, hidden_rows, at.delta);
  join_mtp_input(index, at);
  store_latents(ops_, weights_.mtp->layer.mla, at.normed, index, cache, at.kv, at.angles);
}

Tensor Forward::run_stored_mtp(const StepIndex& index, const int32_t* stored_rows, const CacheLayer& cache) {
  const MtpWeights& mtp = *weights_.mtp;
  const int64_t size = spec_.hidden_size;
  ForwardBuffers at = buffers_.first_rows(index.num_tokens);
  // Beside the rows of the last call, of which they are copies: where there is store_mtp, activations are
  // float32 as the residual stream is.
  const Tensor residual = at.mtp_input.slice_cols(0, size);
  const Tensor input = at.mtp_input.slice_cols(size, size);
  ops_.gather_rows(buffers_.residual, stored_rows, residual);
  ops_.gather_rows(buffers_.normed, stored_rows, input);
  at.residual = residual;
  ops_.rope_table(index, rope_, at.angles);
  run_stored_mla(ops_, mtp.layer.mla, input, index, cache, {at.q_a, at.q, at.kv, at.attention, at.angles},
                 at.delta);
  mlp(mtp.layer, mtp.head_norm, false, at, at.normed);
  return at.normed;
}

bool Forward::can_store_mtp() const { return ops_.has_mla_store() && !weights_.mtp->layer.is_gqa; }

// Angles, and from the hidden states in at.delta the input of the module's attention: at.residual and,
// normed, at.normed.
void Forward::join_mtp_input(const StepIndex& index, const ForwardBuffers& at) {
  const MtpWeights& mtp = *weights_.mtp;
  const int64_t size = spec_.hidden_size;
  ops_.rope_table(index, rope_, at.angles);
  ops_.embed(weights_.embed, index, at.residual);
  ops_.rms_norm(at.residual, mtp.enorm, eps_, at.mtp_input.slice_cols(0, size));
  ops_.rms_norm(at.delta, mtp.hnorm, eps_, at.mtp_input.slice_cols(size, size));
  ops_.linear(at.mtp_input, mtp.eh_proj, at.residual);
  ops_.rms_norm(at.residual, mtp.layer.input_norm, eps_, at.normed);
}

Tensor Forward::mtp_logits(const Tensor& hidden, const int32_t* rows, int64_t num_rows) {
  return head(weights_.mtp->head, hidden, rows, num_rows);
}

}  // namespace rodin
