// Grouped-query attention on the CPU: every instruction path against the float32 reference, and the same bits
// whatever the batch and the number of threads.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ops/cpu/cpu_ops.h"
#include "ops/cpu/cpu_path.h"
#include "ops/cpu/reference_ops.h"
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

constexpr int64_t kBlockSize = 16;

using Floats = std::vector<float>;

Tensor matrix(Floats& values, int64_t cols) {
  return {values.data(), Dtype::kF32, static_cast<int64_t>(values.size()) / cols, cols, cols};
}

// Some consecutive tokens of one sequence.
struct Piece {
  int64_t first_position;
  int64_t count;
  bool is_stored = false;  // the rows lie in the cache already and are not written
};

// A step over some sequences. Sequence s has the blocks s, s + S, s + 2 S, ..: no two of them are neighbours.
struct Step {
  std::vector<int32_t> positions, slots, q_start, seq_of_token, table_start, table;
  StepIndex index;

  Step(const std::vector<Piece>& pieces, const std::vector<int32_t>& seqs, int32_t num_seqs,
       int64_t first_position) {
    q_start.push_back(0);
    table_start.push_back(0);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const int64_t end = pieces[i].first_position + pieces[i].count;
      for (int64_t block = 0; block * kBlockSize < end; ++block) {
        table.push_back(seqs[i] + static_cast<int32_t>(block) * num_seqs);
      }
      for (int64_t p = pieces[i].first_position; p < end; ++p) {
        const int32_t block = table[static_cast<size_t>(table_start.back() + p / kBlockSize)];
        positions.push_back(static_cast<int32_t>(p));
        slots.push_back(pieces[i].is_stored ? -1 : static_cast<int32_t>(block * kBlockSize + p % kBlockSize));
        seq_of_token.push_back(static_cast<int32_t>(i));
      }
      index.max_q_len = std::max(index.max_q_len, pieces[i].count);
      index.max_context_len = std::max(index.max_context_len, end);
      q_start.push_back(static_cast<int32_t>(positions.size()));
      table_start.push_back(static_cast<int32_t>(table.size()));
    }
    index.num_seqs = static_cast<int64_t>(pieces.size());
    index.num_tokens = static_cast<int64_t>(positions.size());
    index.block_size = kBlockSize;
    index.first_position = first_position;
    index.rope_positions = positions.data();
    index.cache_positions = positions.data();
    index.slots = slots.data();
    index.q_start = q_start.data();
    index.seq_of_token = seq_of_token.data();
    index.block_table_start = table_start.data();
    index.block_table = table.data();
  }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
};

struct GqaCase {
  std::string name;
  GqaShape shape;
  std::vector<Piece> pieces;
  int64_t first_position = 0;
};

std::unique_ptr<CpuOps> make_cpu(const GqaCase& c, const std::string& path, int num_threads) {
  auto ops = std::make_unique<CpuOps>(path, num_threads);
  OpsLimits limits;
  limits.max_step_tokens = 256;
  limits.max_num_seqs = 8;
  limits.vocab_size = 8;
  limits.block_size = kBlockSize;
  limits.gqa = c.shape;
  CHECK(ops->reserve(limits) > 0);
  return ops;
}

// Queries, keys and values of a step, and a cache whose older rows hold something already.
struct Data {
  const GqaShape shape;
  Step step;
  Floats inv_freq, angles, q, kv;
  const Dtype dtype;            // of the cache
  std::vector<uint16_t> cache;  // [num_slots, row_dim] f16 or bf16

  Data(const GqaCase& c, Dtype cache_dtype)
      : shape(c.shape),
        step(c.pieces, all_seqs(c), static_cast<int32_t>(c.pieces.size()), c.first_position),
        dtype(cache_dtype) {
    const int64_t tokens = step.index.num_tokens;
    for (int64_t i = 0; i < shape.head_dim / 2; ++i) {
      inv_freq.push_back(1.0f / static_cast<float>(1 + 3 * i));
    }
    angles.resize(static_cast<size_t>(tokens * shape.head_dim));
    OpsRandom random;
    q = random_vector(random, tokens * shape.num_heads * shape.head_dim, 3);  // weights far from even
    kv = random_vector(random, tokens * shape.row_dim(), 1);
    const int64_t num_slots = (*std::max_element(step.table.begin(), step.table.end()) + 1) * kBlockSize;
    for (float value : random_vector(random, num_slots * shape.row_dim(), 1)) {
      cache.push_back(rounded(value));
    }
  }

  uint16_t rounded(float value) const {
    return dtype == Dtype::kBF16 ? bf16_of_float(value) : f16_of_float(value);
  }
  Floats widened() const {
    Floats values;
    for (size_t i = 0; i < cache.size(); ++i) {
      values.push_back(element_as_float(cache.data(), dtype, static_cast<int64_t>(i)));
    }
    return values;
  }

  CacheLayer layer() {
    const int64_t cols = shape.row_dim();
    return {{cache.data(), dtype, static_cast<int64_t>(cache.size()) / cols, cols, cols}};
  }

  static std::vector<int32_t> all_seqs(const GqaCase& c) {
    std::vector<int32_t> seqs;
    for (size_t i = 0; i < c.pieces.size(); ++i) seqs.push_back(static_cast<int32_t>(i));
    return seqs;
  }
};

// The reference's rows, rounded to the cache's type, must be what the path stores; slots that are -1 stay as
// they are.
void check_store(const GqaCase& c, CpuOps& ops) {
  Data data(c, ops.cache_dtype());
  ReferenceOps reference(1);
  const Tensor angles = matrix(data.angles, c.shape.head_dim);
  const RopeParams rope = {data.inv_freq.data(), 1.25f};
  reference.rope_table(data.step.index, rope, angles);
  Floats wanted_q = data.q;
  Floats wanted_kv = data.kv;
  Floats wanted = data.widened();
  const Tensor wanted_cache = matrix(wanted, c.shape.row_dim());
  reference.gqa_rope_store(matrix(wanted_q, c.shape.num_heads * c.shape.head_dim),
                           matrix(wanted_kv, c.shape.row_dim()), c.shape, angles, data.step.index,
                           {wanted_cache});
  // Rotated by hand: pairs (i, i + D/2) of the last token's last key head.
  const int64_t half = c.shape.head_dim / 2;
  const auto last = static_cast<size_t>((data.step.index.num_tokens - 1) * c.shape.row_dim() +
                                        (c.shape.num_kv_heads - 1) * c.shape.head_dim);
  const auto position = static_cast<float>(data.step.positions.back());
  for (int64_t i = 0; i < half; ++i) {
    const double angle = position * data.inv_freq[static_cast<size_t>(i)];
    const double a = data.kv[last + static_cast<size_t>(i)];
    const double b = data.kv[last + static_cast<size_t>(i + half)];
    CHECK_CLOSE(wanted_kv[last + static_cast<size_t>(i)], 1.25 * (a * std::cos(angle) - b * std::sin(angle)),
                1e-6);
    CHECK_CLOSE(wanted_kv[last + static_cast<size_t>(i + half)],
                1.25 * (a * std::sin(angle) + b * std::cos(angle)), 1e-6);
  }

  ops.gqa_rope_store(matrix(data.q, c.shape.num_heads * c.shape.head_dim), matrix(data.kv, c.shape.row_dim()),
                     c.shape, angles, data.step.index, data.layer());
  CHECK(data.q == wanted_q);
  for (size_t i = 0; i < wanted.size(); ++i) CHECK_EQ(data.cache[i], data.rounded(wanted[i]));
}

Floats attend(Data& data, Ops& ops, const StepIndex& index, Floats q) {
  const int64_t cols = data.shape.num_heads * data.shape.head_dim;
  Floats out(q.size(), std::nanf(""));
  ops.gqa_attention(matrix(q, cols), data.shape, index, data.layer(), matrix(out, cols));
  return out;
}

void check_attention(const GqaCase& c, const std::string& path) {
  Data data(c, make_cpu(c, path, 1)->cache_dtype());
  const int64_t cols = c.shape.num_heads * c.shape.head_dim;
  Floats cache = data.widened();
  Floats wanted(data.q.size());
  ReferenceOps(2).gqa_attention(matrix(data.q, cols), c.shape, data.step.index,
                                {matrix(cache, c.shape.row_dim())}, matrix(wanted, cols));

  const Floats got = attend(data, *make_cpu(c, path, 1), data.step.index, data.q);
  for (size_t i = 0; i < wanted.size(); ++i) CHECK_CLOSE(got[i], wanted[i], 3e-6);
  for (int num_threads : {2, 5}) {
    const std::unique_ptr<CpuOps> ops = make_cpu(c, path, num_threads);
    CHECK(attend(data, *ops, data.step.index, data.q) == got);
    // Every token alone, and every piece alone.
    size_t row = 0;
    for (size_t s = 0; s < c.pieces.size(); ++s) {
      const Piece& piece = c.pieces[s];
      const auto num_seqs = static_cast<int32_t>(c.pieces.size());
      const auto check_part = [&](int64_t first, int64_t count) {
        const Step part({{piece.first_position + first, count}}, {static_cast<int32_t>(s)}, num_seqs,
                        c.first_position);
        const auto begin = static_cast<int64_t>(row) + first * cols;
        const Floats q(data.q.begin() + begin, data.q.begin() + begin + count * cols);
        const Floats alone = attend(data, *ops, part.index, q);
        CHECK(std::equal(alone.begin(), alone.end(), got.begin() + begin));
      };
      check_part(0, piece.count);
      for (int64_t i = 0; i < piece.count; ++i) check_part(i, 1);
      row += static_cast<size_t>(piece.count * cols);
    }
  }
}

GqaShape shape_of(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim) {
  GqaShape shape;
  shape.num_heads = num_heads;
  shape.num_kv_heads = num_kv_heads;
  shape.head_dim = head_dim;
  shape.softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return shape;
}

std::vector<GqaCase> gqa_cases() {
  // A prompt over a tile's edge, a chunk over one, a decode, a first token, rows that are there already.
  const std::vector<Piece> pieces = {{0, 70}, {60, 10}, {200, 1}, {0, 1}, {127, 3, true}};
  std::vector<GqaCase> cases;
  for (const auto& [name, shape] :
       std::vector<std::pair<std::string, GqaShape>>{{"6 over 2 heads of 32", shape_of(6, 2, 32)},
                                                     {"5 over 1 heads of 24", shape_of(5, 1, 24)},
                                                     {"3 over 3 heads of 18", shape_of(3, 3, 18)},
                                                     {"14 over 2 heads of 64", shape_of(14, 2, 64)},
                                                     {"17 over 1 heads of 2", shape_of(17, 1, 2)},
                                                     {"8 over 1 heads of 128", shape_of(8, 1, 128)}}) {
    cases.push_back({name, shape, pieces});
  }
  cases.push_back({"position 0 masked", shape_of(4, 2, 16), {{1, 66}, {70, 2}}, 1});
  cases.push_back({"several waves of parts", shape_of(2, 1, 8), {{5000, 2}}});
  return cases;
}

const bool gqa_tests = [] {
  for (const GqaCase& c : gqa_cases()) {
    for (const std::string& path : supported_cpu_paths()) {
      add_test("gqa: " + c.name + ", " + path, [c, path] {
        check_store(c, *make_cpu(c, path, 3));
        check_attention(c, path);
      });
    }
  }
  return true;
}();

}  // namespace
}  // namespace rodin::test
