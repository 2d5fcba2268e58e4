// Rotary embedding of the rope part, plain or stretched by YaRN.
#pragma once

#include <vector>

#include "model/spec.h"

namespace rodin {

struct RopeFrequencies {
  std::vector<float> inv_freq;  // [qk_rope_head_dim / 2]
  float multiplier = 1.0f;      // of cos and sin: mscale / mscale_all_dim
};

RopeFrequencies rope_frequencies(const ModelSpec& spec);

// qk_dim^-1/2, times YaRN's mscale_all_dim correction squared.
float softmax_scale(const ModelSpec& spec);

}  // namespace rodin
