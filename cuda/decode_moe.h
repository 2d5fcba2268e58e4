// Params and launchers of a MoE layer of one token (as kernels.h, with its letters): one launch from the
// residual to what the chosen experts' down projections take, one from there to the residual again.
#pragma once

#include "cuda/kernels.h"

namespace rodin::cuda {

constexpr int kDecodeInputs = 2048;      // of gate and up: H
constexpr int kDecodeMostExperts = 64;   // E
constexpr int kDecodeMostChosen = 15;    // k
constexpr int kDecodeRouteFloats = 192;  // of route_scratch

// Device tables [E + 1], the last one is the shared expert; the views tell the routed ones' shape and its
// own.
struct DecodeExperts {
  const WeightView* gate = nullptr;
  const WeightView* up = nullptr;
  const WeightView* down = nullptr;
  WeightView routed_gate, shared_gate, shared_up;  // shared_*: no rows where there is none
  WeightView routed_down, shared_down;
};

struct DecodeExpertsParams {
  NormParams norm;          // of residual + delta, neither is written; out is not used
  WeightView router;        // [E, H] bf16
  RouteKernelParams route;  // logits and plan are not used
  DecodeExperts experts;
  void* routed_mid = nullptr;  // bf16 [k, Im]
  int64_t routed_stride = 0;
  void* shared_mid = nullptr;  // bf16 [Is]
  uint32_t* taken = nullptr;   // 0 before; decode_down makes it that again
  int32_t num_clusters = 0;    // prepare_decode_experts()
};
bool is_decode_experts(const DecodeExpertsParams& params);
void run_decode_experts(const DecodeExpertsParams& params, cudaStream_t stream);
// How many clusters of its blocks the device runs side by side; once per device.
int32_t prepare_decode_experts();

// residual += delta; residual += the chosen experts' weighted sum and the shared expert.
struct DecodeDownParams {
  DecodeExperts experts;
  const int32_t* expert_ids = nullptr;    // [k]
  const float* expert_weights = nullptr;  // [k]
  const void* routed_mid = nullptr;       // bf16 [k, Im]
  int64_t routed_stride = 0;
  const void* shared_mid = nullptr;  // bf16 [Is]
  float* residual = nullptr;         // [H]
  const void* delta = nullptr;       // bf16 [H]
  uint32_t* taken = nullptr;         // made 0
  int32_t num_experts = 0;
  int32_t experts_per_token = 0;
};
bool is_decode_down(const DecodeDownParams& params);
void run_decode_down(const DecodeDownParams& params, cudaStream_t stream);
void prepare_decode_down();

}  // namespace rodin::cuda
