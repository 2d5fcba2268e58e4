// Norms, embedding and products with weights: every path against the reference, and bitwise batch invariance.
#include "tests/native/ops_support.h"

namespace rodin::test {
namespace {

struct LinearShape {
  int64_t rows;
  int64_t cols;
  int64_t block_rows;
  int64_t block_cols;
};

// Whole blocks, ragged ones, fewer columns than a vector, one row, block sizes that no vector divides.
const std::vector<LinearShape> kShapes = {{256, 256, 128, 128}, {200, 392, 128, 128}, {33, 130, 128, 128},
                                          {1, 512, 128, 128},   {47, 3, 128, 128},    {64, 100, 24, 20},
                                          {70, 257, 64, 32}};

const bool kRegistered = [] {
  for (Dtype dtype : kWeightDtypes) {
    for (const LinearShape& shape : kShapes) {
      for (bool has_bias : {false, true}) {
        const std::string name = std::string("linear ") + dtype_text(dtype) + " " +
                                 std::to_string(shape.rows) + "x" + std::to_string(shape.cols) +
                                 (has_bias ? " with bias" : "");
        add_cpu_test(name, [=](Ops& ops) {
          OpsRandom random;
          const OpsWeight weight(random, shape.rows, shape.cols, dtype, has_bias, shape.block_rows,
                                 shape.block_cols);
          const int64_t num_tokens = 33;
          const OpsMatrix x = OpsMatrix::random_bf16(random, num_tokens, shape.cols, 2);
          OpsMatrix expected(num_tokens, shape.rows);
          make_reference()->linear(x.view, weight.view, expected.view);
          Weight placed = weight.view;
          ops.place(placed);
          ops.reserve(test_limits());
          OpsMatrix all(num_tokens, shape.rows);
          ops.linear(x.view, placed, all.view);
          check_near(all.view, expected.view, 3e-6f);
          CHECK(all.padding_is_untouched());
          // Any part of the batch gives the same bits.
          for (int64_t count : {1, 2, 3, 4, 5, 7, 32}) {
            for (int64_t first = 0; first + count <= num_tokens; first += count) {
              OpsMatrix part(count, shape.rows);
              ops.linear(x.view.slice_rows(first, count), placed, part.view);
              for (int64_t t = 0; t < count; ++t)
                CHECK(same_bits(part.row(t), all.row(first + t), shape.rows));
            }
          }
        });
      }
    }
    add_cpu_test(std::string("linear_pair and gate_up_silu ") + dtype_text(dtype), [=](Ops& ops) {
      OpsRandom random;
      const OpsWeight gate(random, 144, 200, dtype);
      const OpsWeight up(random, 144, 200, dtype);
      const OpsMatrix x = OpsMatrix::random_bf16(random, 19, 200, 3);
      MlpWeights mlp;
      mlp.gate = gate.view;
      mlp.up = up.view;
      MlpWeights placed = mlp;
      ops.place(placed);
      ops.reserve(test_limits());
      const std::unique_ptr<Ops> reference = make_reference();
      OpsMatrix out0(19, 144), out1(19, 144), single(19, 144), expected(19, 144), mlp_out(19, 144);
      ops.linear_pair(x.view, placed.gate, out0.view, placed.up, out1.view);
      ops.linear(x.view, placed.up, single.view);
      for (int64_t t = 0; t < 19; ++t) CHECK(same_bits(out1.row(t), single.row(t), 144));
      reference->linear(x.view, gate.view, expected.view);
      check_near(out0.view, expected.view, 3e-6f);

      reference->gate_up_silu(x.view, mlp, expected.view);
      ops.gate_up_silu(x.view, placed, mlp_out.view);
      check_near(mlp_out.view, expected.view, 5e-6f);
      CHECK(mlp_out.padding_is_untouched());
      OpsMatrix alone(1, 144);
      ops.gate_up_silu(x.view.slice_rows(7, 1), placed, alone.view);
      CHECK(same_bits(alone.row(0), mlp_out.row(7), 144));
    });
    add_cpu_test(std::string("embed ") + dtype_text(dtype), [=](Ops& ops) {
      OpsRandom random;
      const OpsWeight table(random, 300, 139, dtype);
      const std::vector<int32_t> ids = {0, 299, 7, 7, 128};
      StepIndex index;
      index.num_tokens = 5;
      index.token_ids = ids.data();
      ops.reserve(test_limits());
      OpsMatrix out(5, 139), expected(5, 139);
      make_reference()->embed(table.view, index, expected.view);
      ops.embed(table.view, index, out.view);
      for (int64_t t = 0; t < 5; ++t) CHECK(same_bits(out.row(t), expected.row(t), 139));
      CHECK(out.padding_is_untouched());
    });
  }
  for (int64_t size : {1, 15, 200, 512}) {
    add_cpu_test("rms_norm and add_rms_norm of " + std::to_string(size), [=](Ops& ops) {
      OpsRandom random;
      const int64_t rows = 37;
      const OpsMatrix x = OpsMatrix::random(random, rows, size, 4);
      const OpsMatrix delta = OpsMatrix::random(random, rows, size, 4);
      const std::vector<float> weight = random_vector(random, size, 2);
      ops.reserve(test_limits());
      const std::unique_ptr<Ops> reference = make_reference();
      OpsMatrix out(rows, size), expected(rows, size), residual = x, expected_residual = x, in_place = x;
      reference->rms_norm(x.view, weight.data(), 1e-6f, expected.view);
      ops.rms_norm(x.view, weight.data(), 1e-6f, out.view);
      check_near(out.view, expected.view, 2e-6f);
      ops.rms_norm(in_place.view, weight.data(), 1e-6f, in_place.view);
      CHECK(same_bits(in_place.row(rows - 1), out.row(rows - 1), size));
      reference->add_rms_norm(expected_residual.view, delta.view, weight.data(), 1e-6f, expected.view);
      ops.add_rms_norm(residual.view, delta.view, weight.data(), 1e-6f, out.view);
      check_near(out.view, expected.view, 2e-6f);
      for (int64_t t = 0; t < rows; ++t) CHECK(same_bits(residual.row(t), expected_residual.row(t), size));
      OpsMatrix alone(1, size), alone_residual = x;
      ops.add_rms_norm(alone_residual.view.slice_rows(5, 1), delta.view.slice_rows(5, 1), weight.data(),
                       1e-6f, alone.view);
      CHECK(same_bits(alone.row(0), out.row(5), size));
      CHECK(out.padding_is_untouched() && residual.padding_is_untouched());
    });
  }
  add_cpu_test("gather_rows", [](Ops& ops) {
    OpsRandom random;
    const OpsMatrix from = OpsMatrix::random(random, 9, 21, 1);
    const std::vector<int32_t> rows = {8, 0, 3, 3};
    OpsMatrix to(4, 21);
    ops.gather_rows(from.view, rows.data(), to.view);
    for (int64_t i = 0; i < 4; ++i) CHECK(same_bits(to.row(i), from.row(rows[static_cast<size_t>(i)]), 21));
    CHECK(to.padding_is_untouched());
  });
  return true;
}();

}  // namespace
}  // namespace rodin::test
