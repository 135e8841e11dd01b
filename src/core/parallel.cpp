#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace flash_dmattn {
namespace {

void run_on_own_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> others;
  int started = 1;
  try {
    others.reserve(static_cast<std::size_t>(count - 1));
    for (; started < count; ++started) others.emplace_back(body, started);
  } catch (...) {  // no more threads to be had: the ones there are do the work
  }
  body(0);
  for (std::thread& other : others) other.join();
  for (int worker = started; worker < count; ++worker) body(worker);
}

}  // namespace

Threads hardware_threads() { return {static_cast<int>(std::max(1u, std::thread::hardware_concurrency())), {}}; }

int workers_for(std::int64_t count, const Threads& threads) {
  return static_cast<int>(std::clamp<std::int64_t>(count, 1, std::max(threads.count, 1)));
}

void run_tasks(std::int64_t count, const Threads& threads, const std::function<void(std::int64_t, int)>& task) {
  std::atomic<std::int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const std::function<void(int)> body = [&](int worker) {
    try {
      for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i, worker);
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      const std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  const int workers = workers_for(count, threads);
  if (workers == 1)
    body(0);
  else if (threads.run)
    threads.run(workers, body);
  else
    run_on_own_threads(workers, body);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace flash_dmattn
