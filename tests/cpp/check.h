// Checks and the registry of tests. A failed check reports itself and the test goes on.
#pragma once
#include <sstream>
#include <string>

namespace flash_dmattn::test {

struct Registered {
  Registered(const char* file, const char* name, void (*run)());
};

/// What the test is doing, printed with each of its failures while it lives.
class Context {
 public:
  explicit Context(std::string text);
  ~Context();
  Context(const Context&) = delete;
};

void fail(const char* file, int line, const std::string& message);

/// How many random cases a test draws (--cases).
int random_cases();

}  // namespace flash_dmattn::test

/// Defines and registers a test.
#define TEST(name)                                                                      \
  static void name();                                                                   \
  static const flash_dmattn::test::Registered name##_registered(__FILE__, #name, name); \
  static void name()

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) flash_dmattn::test::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_EQUAL(got, expected)                                      \
  do {                                                                  \
    const auto got_ = (got);                                            \
    const auto expected_ = (expected);                                  \
    if (!(got_ == expected_)) {                                         \
      std::ostringstream message_;                                      \
      message_ << #got << " is " << got_ << ", expected " << expected_; \
      flash_dmattn::test::fail(__FILE__, __LINE__, message_.str());     \
    }                                                                   \
  } while (false)

/// The expression throws InvalidArgument, and the message begins with the argument's name and holds `part`.
#define CHECK_REFUSED(expression, argument, part)                                                        \
  do {                                                                                                   \
    std::string message_ = "nothing";                                                                    \
    try {                                                                                                \
      expression;                                                                                        \
    } catch (const flash_dmattn::InvalidArgument& error_) {                                              \
      message_ = error_.what();                                                                          \
    }                                                                                                    \
    if (message_.rfind(std::string(argument) + ":", 0) != 0 || message_.find(part) == std::string::npos) \
      flash_dmattn::test::fail(__FILE__, __LINE__, #expression " throws \"" + message_ + "\"");          \
  } while (false)
