// How the engine runs work in parallel: on threads of its own, or on its caller's.
#pragma once
#include <functional>

namespace flash_dmattn {

struct Threads {
  /// Workers to run at once, at least 1.
  int count = 1;
  /// Runs body(worker) once for every worker in [0, count), at once or one after the other, and returns when all have
  /// ended. Empty: the engine starts count - 1 threads of its own for each call. `body` throws nothing.
  std::function<void(int count, const std::function<void(int worker)>& body)> run;
};

/// As many workers as the machine has hardware threads.
Threads hardware_threads();

}  // namespace flash_dmattn
