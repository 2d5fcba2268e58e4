// Params and launchers of what surrounds the attention of few tokens (as kernels.h, with its letters): one
// launch of a block a multiprocessor ahead of the attention kernel, one behind it.
#pragma once

#include "cuda/kernels.h"

namespace rodin::cuda {

constexpr int kDecodeRowTiles = 2;      // tiles of 16 weight rows of a block, at most
constexpr int kDecodeRowWarps = 16;     // warps of a block, and most blocks of inputs
constexpr int kArrivalsEach = 1 << 16;  // what a launch counts up, however many blocks it has
constexpr int kExchangeWords = 4096;    // pairs of outputs that blocks of a launch for one token give others

// One or two matrices and their inputs, few enough that a launch holds their weights in registers.
struct DecodeRows {
  WeightView weight[2];  // FP8; the second may have no rows
  LinearIo io[2];        // bf16; x is that of the first
};

struct DecodeEnterParams {
  DecodeRows rows;               // q and kv_a, from the layer's normed input
  NormParams norm;               // of one token (is_decode_enter_one), where x is set: makes that input here
  MlaEnterParams enter;          // of their outputs
  uint64_t* arrivals = nullptr;  // a multiple of kArrivalsEach between launches
  uint64_t* exchange = nullptr;  // [kExchangeWords] 16-byte aligned; the launches' own
  int32_t num_multiprocessors = 0;
};
bool is_decode_enter(const DecodeEnterParams& params);
void run_decode_enter(const DecodeEnterParams& params, cudaStream_t stream);
// The kernel for one token, whether it is for what is_decode_enter takes; the same for the next.
bool is_decode_enter_one(const DecodeEnterParams& params);
void run_decode_enter_one(const DecodeEnterParams& params, cudaStream_t stream);
void prepare_decode_enter_one();

struct DecodeLeaveParams {
  MlaLeaveParams leave;
  DecodeRows rows;  // o, of what leave writes
  uint64_t* arrivals = nullptr;
  uint64_t* exchange = nullptr;
  int32_t num_multiprocessors = 0;
};
bool is_decode_leave(const DecodeLeaveParams& params);
void run_decode_leave(const DecodeLeaveParams& params, cudaStream_t stream);
bool is_decode_leave_one(const DecodeLeaveParams& params);
void run_decode_leave_one(const DecodeLeaveParams& params, cudaStream_t stream);
void prepare_decode_leave_one();

}  // namespace rodin::cuda
