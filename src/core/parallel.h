// Tasks over workers.
#pragma once
#include <cstdint>
#include <functional>

#include "flash_dmattn/threads.h"

namespace flash_dmattn {

/// Calls task(index, worker) for every index in [0, count). Workers take the indices in ascending order, so a task may
/// wait for tasks of smaller index. The first exception that a task throws is thrown here once all workers have ended;
/// the tasks that had not begun by then are left out.
void run_tasks(std::int64_t count, const Threads& threads,
               const std::function<void(std::int64_t index, int worker)>& task);

/// How many workers `count` tasks can keep busy.
int workers_for(std::int64_t count, const Threads& threads);

}  // namespace flash_dmattn
