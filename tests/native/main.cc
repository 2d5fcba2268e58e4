// Runs every registered test, or those whose name contains one of the arguments; each must be in some name.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "tests/native/test.h"

int main(int argc, char** argv) {
  std::vector<const char*> filters(argv + 1, argv + argc);
  if (filters.empty()) filters.push_back("");
  std::vector<char> is_met(filters.size(), 0);
  int passed = 0, failed = 0;
  for (const rodin::test::TestCase& test : rodin::test::test_cases()) {
    bool is_meant = false;
    for (size_t i = 0; i < filters.size(); ++i) {
      if (std::strstr(test.name.c_str(), filters[i]) == nullptr) continue;
      is_meant = is_met[i] = true;
    }
    if (!is_meant) continue;
    const auto start = std::chrono::steady_clock::now();
    try {
      test.body();
      ++passed;
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s\n  %s\n", test.name.c_str(), error.what());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (seconds > 1) std::printf("slow: %s took %.1f s\n", test.name.c_str(), seconds);
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  for (size_t i = 0; i < filters.size(); ++i)
    if (!is_met[i]) std::printf("no test matches '%s'\n", filters[i]);
  const bool all_met = std::all_of(is_met.begin(), is_met.end(), [](char met) { return met != 0; });
  return failed == 0 && all_met ? 0 : 1;
}
