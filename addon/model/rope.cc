#include "model/rope.h"

#include <algorithm>
#include <cmath>

namespace rodin {
namespace {

constexpr double kPi = 3.14159265358979323846;

// 0.1 m ln(factor) + 1: YaRN's attention temperature.
double yarn_mscale(double factor, double m) { return factor <= 1 ? 1.0 : 0.1 * m * std::log(factor) + 1.0; }

// Dimensions that turn more than beta_fast times over the original context keep their frequency, those below
// beta_slow are interpolated, a linear ramp lies between.
void stretch_yarn(const ModelSpec& spec, const YarnScaling& yarn, RopeFrequencies& rope) {
  const auto dim = static_cast<double>(spec.rope_dim());
  const auto dim_of_turns = [&](double turns) {
    const double original = yarn.original_max_position_embeddings;
    return dim * std::log(original / (turns * 2 * kPi)) / (2 * std::log(spec.rope_theta));
  };
  const double low = std::max(std::floor(dim_of_turns(yarn.beta_fast)), 0.0);
  const double high = std::min(std::ceil(dim_of_turns(yarn.beta_slow)), dim - 1);
  const auto width = static_cast<float>(std::max(high - low, 0.001));
  for (size_t i = 0; i < rope.inv_freq.size(); ++i) {
    const float ramp = std::clamp((static_cast<float>(i) - static_cast<float>(low)) / width, 0.0f, 1.0f);
    const float plain = rope.inv_freq[i];
    rope.inv_freq[i] = plain / static_cast<float>(yarn.factor) * ramp + plain * (1.0f - ramp);
  }
  rope.multiplier = static_cast<float>(yarn_mscale(yarn.factor, yarn.mscale) /
                                       yarn_mscale(yarn.factor, yarn.mscale_all_dim));
}

// Frequencies that turn more than high_freq_factor times over the original context stay, those that turn
// less than low_freq_factor times are divided by factor, between them the two are mixed.
void stretch_llama3(const Llama3Scaling& llama3, RopeFrequencies& rope) {
  for (float& inv_freq : rope.inv_freq) {
    const double turns = llama3.original_max_position_embeddings * static_cast<double>(inv_freq) / (2 * kPi);
    const double mixed =
        (turns - llama3.low_freq_factor) / (llama3.high_freq_factor - llama3.low_freq_factor);
    const double keep = std::clamp(mixed, 0.0, 1.0);
    inv_freq = static_cast<float>((1 - keep) * static_cast<double>(inv_freq) / llama3.factor +
                                  keep * static_cast<double>(inv_freq));
  }
}

}  // namespace

RopeFrequencies rope_frequencies(const ModelSpec& spec) {
  const int64_t dim = spec.rope_dim();
  RopeFrequencies rope;
  for (int64_t i = 0; i < dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(dim);
    rope.inv_freq.push_back(1.0f / std::pow(static_cast<float>(spec.rope_theta), exponent));
  }
  if (spec.yarn) stretch_yarn(spec, *spec.yarn, rope);
  if (spec.llama3) stretch_llama3(*spec.llama3, rope);
  for (float& inv_freq : rope.inv_freq) inv_freq /= static_cast<float>(spec.rope_linear_factor);
  return rope;
}

float softmax_scale(const ModelSpec& spec) {
  if (spec.is_gqa()) return static_cast<float>(1.0 / std::sqrt(static_cast<double>(spec.head_dim)));
  double scale = 1.0 / std::sqrt(static_cast<double>(spec.qk_nope_head_dim + spec.qk_rope_head_dim));
  if (spec.yarn && spec.yarn->mscale_all_dim != 0) {
    const double mscale = yarn_mscale(spec.yarn->factor, spec.yarn->mscale_all_dim);
    scale *= mscale * mscale;
  }
  return static_cast<float>(scale);
}

}  // namespace rodin
