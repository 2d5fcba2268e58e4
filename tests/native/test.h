// The native tests' own small harness: TEST(name) registers a body, CHECK(...) throws on failure with the
// values in its message. A body runs to its end or to its first failed check.
#pragma once

#include <cmath>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace rodin::test {

struct TestCase {
  std::string name;
  std::function<void()> body;
};

inline std::vector<TestCase>& test_cases() {
  static std::vector<TestCase> cases;
  return cases;
}

// Registers a body; call it in a loop for one body over many parameters.
inline bool add_test(std::string name, std::function<void()> body) {
  test_cases().push_back({std::move(name), std::move(body)});
  return true;
}

struct CheckFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& message) {
  std::ostringstream text;
  text << file << ":" << line << ": " << message;
  throw CheckFailed(text.str());
}

template <class A, class B>
void check_equal(const A& a, const B& b, const char* expressions, const char* file, int line) {
  if (a == b) return;
  std::ostringstream text;
  text.precision(9);
  text << expressions << ": " << a << " != " << b;
  fail(file, line, text.str());
}

inline void check_close(double a, double b, double tolerance, const char* expressions, const char* file,
                        int line) {
  if (std::abs(a - b) <= tolerance || a == b) return;  // false for a NaN
  std::ostringstream text;
  text.precision(9);
  text << expressions << ": " << a << " and " << b << " differ by more than " << tolerance;
  fail(file, line, text.str());
}

// Runs f, which must throw an exception whose message contains `part`.
template <class F>
void check_throws(F&& f, const std::string& part, const char* file, int line) {
  std::string message;
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
    if (message.find(part) != std::string::npos) return;
    fail(file, line, "the message '" + message + "' does not contain '" + part + "'");
  }
  fail(file, line, "nothing was thrown; expected a message with '" + part + "'");
}

}  // namespace rodin::test

#define RODIN_TEST_NAME2(line) rodin_test_##line
#define RODIN_TEST_NAME(line) RODIN_TEST_NAME2(line)
#define TEST(name)                                                               \
  static void RODIN_TEST_NAME(__LINE__)();                                       \
  namespace {                                                                    \
  const bool RODIN_TEST_REGISTRAR(__LINE__) = ::rodin::test::add_test(name, [] { \
    RODIN_TEST_NAME(__LINE__)();                                                 \
  });                                                                            \
  }                                                                              \
  static void RODIN_TEST_NAME(__LINE__)()
#define RODIN_TEST_REGISTRAR2(line) rodin_registered_##line
#define RODIN_TEST_REGISTRAR(line) RODIN_TEST_REGISTRAR2(line)

#define CHECK(condition) \
  ((condition) ? void() : ::rodin::test::fail(__FILE__, __LINE__, "false: " #condition))
#define CHECK_EQ(a, b) ::rodin::test::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_CLOSE(a, b, tolerance) \
  ::rodin::test::check_close((a), (b), (tolerance), #a " ~ " #b, __FILE__, __LINE__)
#define CHECK_THROWS(expression, part) \
  ::rodin::test::check_throws([&] { expression; }, (part), __FILE__, __LINE__)
