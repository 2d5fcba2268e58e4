// Rotary embedding of the rope part (GQA: of whole heads), plain or stretched by YaRN, llama3 or linearly.
#pragma once

#include <vector>

#include "model/spec.h"

namespace rodin {

struct RopeFrequencies {
  std::vector<float> inv_freq;  // [rope_dim / 2]
  float multiplier = 1.0f;      // of cos and sin: mscale / mscale_all_dim
};

RopeFrequencies rope_frequencies(const ModelSpec& spec);

// MLA: qk_dim^-1/2, times YaRN's mscale_all_dim correction squared. GQA: head_dim^-1/2.
float softmax_scale(const ModelSpec& spec);

}  // namespace rodin
