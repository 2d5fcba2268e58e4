// Runs every registered test, or those whose name contains the first argument.
#include <chrono>
#include <cstdio>
#include <cstring>

#include "tests/native/test.h"

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  int passed = 0, failed = 0;
  for (const rodin::test::TestCase& test : rodin::test::test_cases()) {
    if (std::strstr(test.name.c_str(), filter) == nullptr) continue;
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
  if (passed + failed == 0) {
    std::printf("no test matches '%s'\n", filter);
    return 1;
  }
  return failed == 0 ? 0 : 1;
}
