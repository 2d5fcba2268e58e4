// CUDA: a whole decode step of a Moonlight-shaped model with synthetic FP8 weights, as the forward runs it,
// the bits of a recorded step, and of one whose tokens the host does not know.
#include <chrono>
#include <cstdio>

#include "tests/native/cuda_step_rig.h"

namespace rodin::test {
namespace {

struct StepFloor {
  int64_t batch;
  double limit;  // tokens/s that an H100's memory allows
  double share;  // of it; a little below what was reached
};

void time_steps(bool is_deterministic, const std::vector<StepFloor>& floors) {
  StepRig rig(moonlight(27), 128, 1024, is_deterministic);
  bool is_fast = true;
  for (const auto& [batch, limit, share] : floors) {
    double best = 1e9, unrecorded = 0;
    for (int round = 0; round < 30; ++round) {
      rig.begin(batch, 1024, static_cast<uint32_t>(round + 1));
      const auto start = std::chrono::steady_clock::now();
      rig.wait(rig.run());
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      if (round == 0) unrecorded = elapsed.count();
      best = std::min(best, elapsed.count());
    }
    const double tokens_per_s = static_cast<double>(batch) / best;
    std::printf(
        "moonlight, batch %3d: %7.2f ms a step (%.2f at first), %7.0f tokens/s, %.0f %% of the limit\n",
        static_cast<int>(batch), best * 1e3, unrecorded * 1e3, tokens_per_s, tokens_per_s / limit * 100);
    std::fflush(stdout);
    is_fast = is_fast && tokens_per_s >= share * limit;
  }
  CHECK(is_fast);
}

const bool step_speed = [] {
  add_cuda_test("speed of a Moonlight step", [] {
    time_steps(true, {{1, 1020, 0.38}, {8, 2499, 0.58}, {32, 5963, 0.57}, {128, 20243, 0.38}});
  });
  add_cuda_test("speed of a Moonlight step, not deterministic",
                [] { time_steps(false, {{1, 1020, 0.6}, {64, 11000, 0.48}, {128, 20243, 0.43}}); });
  return true;
}();

// A few keys more must not cost more than their bytes.
const bool context_speed = add_cuda_test("speed of a Moonlight step by its context", [] {
  StepRig rig(moonlight(27), 1, 2304, false);
  double before = 0;
  for (const int64_t context : {512, 521, 1024, 1025, 1100, 1536, 2048, 2049}) {
    double best = 1e9;
    for (int round = 0; round < 30; ++round) {
      rig.begin(1, context, static_cast<uint32_t>(round + 1));
      const auto start = std::chrono::steady_clock::now();
      rig.wait(rig.run());
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      best = std::min(best, elapsed.count());
    }
    std::printf("moonlight, one sequence of %4d: %.3f ms a step\n", static_cast<int>(context), best * 1e3);
    std::fflush(stdout);
    CHECK(before == 0 || best < 1.05 * before);
    before = best;
  }
});

// Each part enqueued again and again, so that no launch is waited for.
const bool part_speed = add_cuda_test("speed of a Moonlight step's parts", [] {
  StepRig rig(moonlight(27), 32, 1024, false);
  for (const int64_t batch : {1, 32}) {
    rig.begin(batch, 1024, 1);
    const float* logits = rig.run();
    const auto micros_of = [&](auto&& part) {
      constexpr int kRounds = 40;
      double best = 1e9;
      for (int repeat = 0; repeat < 4; ++repeat) {
        rig.wait(logits);
        const auto start = std::chrono::steady_clock::now();
        for (int round = 0; round < kRounds; ++round) part(round);
        rig.wait(logits);
        const std::chrono::duration<double, std::micro> elapsed = std::chrono::steady_clock::now() - start;
        best = std::min(best, elapsed.count() / kRounds);
      }
      return best;
    };
    const double layers = micros_of([&](int) { rig.run_layers(); });
    const double head = micros_of([&](int) { rig.run_head(); });
    const double sampling = micros_of([&](int round) { rig.begin_sample(logits, round % 2, -1); });
    const double logprobs = micros_of([&](int round) { rig.begin_sample(logits, round % 2, 0); });
    const double likeliest = micros_of([&](int round) { rig.begin_sample(logits, round % 2, 20); });
    const double noise = micros_of([&](int round) { rig.begin_sample(logits, round % 2, -1, 1); });
    const double nucleus =
        micros_of([&](int round) { rig.begin_sample(logits, round % 2, -1, 0.6f, 0.95f); });
    const double all = micros_of([&](int round) { rig.begin_sample(rig.run(), round % 2, -1); });
    std::printf(
        "moonlight, batch %2d: layers %.0f us, head %.0f, greedy %.0f, with a logprob %.0f, with 20 %.0f, "
        "with noise %.0f, top_p %.0f; a step %.0f\n",
        static_cast<int>(batch), layers, head, sampling, logprobs, likeliest, noise, nucleus, all);
    std::fflush(stdout);
    CHECK(sampling < 0.05 * all && nucleus < 0.1 * all);
  }
});

const bool prompt_speed = add_cuda_test("speed of a Moonlight prompt", [] {
  StepRig rig(moonlight(27), 1, 8192, false, 8192);
  bool is_fast = true;
  for (const auto& [length, most_ms] : {std::pair{512, 15.0}, {1024, 18.0}, {2048, 30.0}, {8192, 120.0}}) {
    double best = 1e9;
    for (int round = 0; round < 8; ++round) {
      rig.begin_prompt(length, static_cast<uint32_t>(round + 1));
      const auto start = std::chrono::steady_clock::now();
      rig.wait(rig.run());
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      best = std::min(best, elapsed.count());
    }
    std::printf("moonlight, a prompt of %4d tokens: %7.2f ms, %.0f tokens/s\n", static_cast<int>(length),
                best * 1e3, static_cast<double>(length) / best);
    std::fflush(stdout);
    is_fast = is_fast && best * 1e3 <= most_ms;
  }
  CHECK(is_fast);
});

// Small enough to be looked at kernel by kernel.
const bool small_steps = [] {
  for (const int64_t batch : {1, 8, 32, 128}) {
    add_cuda_test("step of three layers, batch " + std::to_string(batch), [batch] {
      StepRig rig(moonlight(3), batch, 1024);
      rig.begin(batch, 1024, 1);
      for (const float logit : rig.logits(batch)) CHECK(std::isfinite(logit));
    });
  }
  return true;
}();

const bool small_prompt = add_cuda_test("prompt of three layers", [] {
  StepRig rig(moonlight(3), 1, 1024, false, 1024);
  rig.begin_prompt(1024, 1);
  for (const float logit : rig.logits(1)) CHECK(std::isfinite(logit));
});

const bool recorded_bits = add_cuda_test("step: a recorded step gives the bits of the first", [] {
  StepRig rig(moonlight(2), 36, 700);
  for (const int64_t batch : {1, 3, 17}) {
    const int64_t other_block = 12 * batch;  // the two steps write nothing of one another's
    // The first step of a shape runs unrecorded, the others as a graph over other tokens and contexts.
    rig.begin(batch, 700, 1);
    const Floats first = rig.logits(batch);
    rig.begin(batch, 450, 2, other_block);
    const Floats other = rig.logits(batch);
    CHECK(first != other);
    rig.begin(batch, 700, 1);
    CHECK(rig.logits(batch) == first);
    rig.begin(batch, 450, 2, other_block);
    CHECK(rig.logits(batch) == other);
  }
});

// One token without --deterministic has kernels of its own, which leave the norm ahead of attention to its
// reader.
const bool one_token =
    add_cuda_test("step: one token's own kernels give nearly the logits of the others", [] {
      StepRig others(moonlight(3), 1, 700), own(moonlight(3), 1, 700, false);
      int num_near = 0;
      for (uint32_t seed = 1; seed <= 4; ++seed) {  // unrecorded, recorded, replayed twice
        others.begin(1, 700, seed);
        own.begin(1, 700, seed);
        const double error = relative_error(own.logits(1), others.logits(1));
        std::printf("one token, seed %u: logits differ by %.1e\n", seed, error);
        CHECK(error > 0);
        num_near += error < 3e-2;
      }
      CHECK(num_near >= 3);  // a token between two experts that are nearly as good may go either way
    });

const bool ahead = add_cuda_test("step: tokens that only the device knows give the bits of known ones", [] {
  StepRig rig(moonlight(2), 36, 700);
  for (const int64_t batch : {1, 3, 17}) {
    std::vector<int32_t> rows;  // [batch] each sequence takes another one's token
    for (int64_t s = 0; s < batch; ++s) rows.push_back(static_cast<int32_t>(-1 - (s + 1) % batch));
    for (uint32_t seed = 1; seed < 4; ++seed) {  // unrecorded, recorded, replayed
      rig.begin(batch, 699, seed);
      rig.begin_sample(rig.run(), 0);
      rig.begin(batch, 700, 0, 0, &rows);
      rig.begin_sample(rig.run(), 1);  // two steps are under way
      const SampleResult first = rig.sampled(0), second = rig.sampled(1);
      std::vector<int32_t> known;
      for (int64_t s = 0; s < batch; ++s)
        known.push_back(first.sampled_ids[static_cast<size_t>((s + 1) % batch)]);
      rig.begin(batch, 700, 0, 0, &known);
      rig.begin_sample(rig.run(), 0);
      const SampleResult again = rig.sampled(0);
      CHECK(again.sampled_ids == second.sampled_ids);
      CHECK(again.sampled_logprobs == second.sampled_logprobs);
      CHECK(again.top_ids == second.top_ids);
      CHECK(again.top_logprobs == second.top_logprobs);
      CHECK(first.sampled_ids != second.sampled_ids);
    }
  }
});

}  // namespace
}  // namespace rodin::test
