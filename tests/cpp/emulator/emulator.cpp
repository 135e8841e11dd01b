#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <utility>

#include "barriers.h"
#include "bulk_copies.h"
#include "products.h"
#include "ptx/boxes.cuh"
#include "threads.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1  // as g++ does
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace flash_dmattn::cuda {
namespace emulator {

// A place where a function call waits: its stack, and where it stopped.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer;
};

// Saves the registers that a function must keep, and goes on on another stack.
extern "C" void emulator_switch(Context* from, const Context* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

static void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // the return address of `entry`, which does not return
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
using Context = ucontext_t;

static void emulator_switch(Context* from, const Context* to) { swapcontext(from, to); }

static void prepare(Context& context, char* stack, std::size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}
#endif

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 512 << 10;
#else
constexpr std::size_t kStackBytes = 128 << 10;
#endif

/// Stacks are used again and again. The page behind the end of one faults.
class Stack {
 public:
  Stack() {
    if (unused().empty()) {
      const std::size_t guard = sysconf(_SC_PAGESIZE);
      void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw Error("no memory for a stack");
      unused().push_back(static_cast<char*>(memory) + guard);
    }
    start_ = unused().back();
    unused().pop_back();
  }
  Stack(Stack&& other) noexcept : start_(std::exchange(other.start_, nullptr)) {}
  ~Stack() {
    if (start_) unused().push_back(start_);
  }
  char* start() const { return start_; }

 private:
  static std::vector<char*>& unused() {
    static std::vector<char*> stacks;
    return stacks;
  }
  char* start_;
};

struct NumberedBarrier {
  std::vector<struct Fiber*> waiting;
  int threads = 0, arrived = 0;
};

/// Of a warp or a warpgroup.
struct Meeting {
  std::vector<struct Fiber*> waiting;
  void* given[128];
  const char* operation;
  void (*work)(void* const* given);
};

struct RunningBlock : Block {
  std::vector<char> memory;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps, warpgroup_meetings;
  NumberedBarrier numbered_barriers[16];
  int alive;
};

enum class State { ready, waiting, polling, finished };

struct Fiber : Thread {
  Context context;
  Stack stack;
  State state;
  void* fake_stack = nullptr;  // of the address sanitizer
};

constexpr int kGuard = 1024;
constexpr unsigned char kGuardByte = 0xa5;

bool is_guard(const void* p) {
  const auto* bytes = static_cast<const unsigned char*>(p);
  return std::all_of(bytes, bytes + kGuard, [](unsigned char byte) { return byte == kGuardByte; });
}

class Launch {
 public:
  Launch(const EmulatedKernel& kernel, Grid grid, int shared_bytes, const void* params, int resident, unsigned seed)
      : kernel_(kernel), grid_(grid), shared_bytes_(shared_bytes), params_(params), random_(seed) {
    const i64 count = static_cast<i64>(grid.x) * grid.y * grid.z;
    blocks_.resize(static_cast<std::size_t>(least<i64>(resident, count)));
    count_ = count;
  }

  void run();

  Fiber& fiber() { return *static_cast<Fiber*>(self); }
  void make_ready(Fiber* fiber) {
    fiber->state = State::ready;
    ready_.push_back(fiber);
  }
  void leave(State state);
  void step_back();
  void fail(const char* format, std::va_list arguments);

 private:
  static void start();
  void begin(RunningBlock& block, i64 index);
  void end(RunningBlock& block);
  void land_something();
  std::string who_waits() const;

  const EmulatedKernel& kernel_;
  const Grid grid_;
  const int shared_bytes_;
  const void* params_;
  std::minstd_rand random_;
  i64 next_ = 0, count_;
  std::vector<RunningBlock> blocks_;
  std::vector<Fiber*> ready_, polling_;
  Context scheduler_;
  std::string error_;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_;
  std::size_t scheduler_stack_bytes_;
#endif
};

Launch* launch = nullptr;

std::string name(const Block& block) {
  std::ostringstream text;
  text << "block (" << block.index[0] << ", " << block.index[1] << ", " << block.index[2] << ")";
  return text.str();
}

void Launch::start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler_stack_, &launch->scheduler_stack_bytes_);
#endif
  launch->kernel_.run(launch->params_, self->block->shared);
  end_bulk_copies();
  require_no_products();
  launch->leave(State::finished);
}

// Back to the scheduler; returns when this thread has its turn again.
void Launch::leave(State state) {
  Fiber& leaving = fiber();
  leaving.state = state;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(state == State::finished ? nullptr : &leaving.fake_stack, scheduler_stack_,
                                 scheduler_stack_bytes_);
#endif
  emulator_switch(&leaving.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(leaving.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
}

void Launch::step_back() {
  if (random_() % 2 == 0) return;
  ready_.insert(ready_.begin(), &fiber());  // the last to be taken, mostly
  leave(State::ready);
}

void Launch::fail(const char* format, std::va_list arguments) {
  char text[256];
  std::vsnprintf(text, sizeof text, format, arguments);
  error_ = name(*self->block) + ", thread " + std::to_string(self->index) + ": " + text;
  while (true) leave(State::finished);
}

void Launch::begin(RunningBlock& block, i64 index) {
  block.index[0] = static_cast<int>(index % grid_.x);
  block.index[1] = static_cast<int>(index / grid_.x % grid_.y);
  block.index[2] = static_cast<int>(index / grid_.x / grid_.y);
  block.grid[0] = static_cast<int>(grid_.x);
  block.grid[1] = static_cast<int>(grid_.y);
  block.grid[2] = static_cast<int>(grid_.z);
  block.threads = block.alive = kernel_.threads;
  block.fibers.resize(kernel_.threads);
  block.warps.resize(kernel_.threads / 32);
  block.warpgroup_meetings.resize(divide_up(kernel_.threads, 128));
  for (NumberedBarrier& barrier : block.numbered_barriers) barrier.arrived = 0;
  block.barriers.clear();
  block.warpgroups.assign(divide_up(kernel_.threads, 128), {});
  for (int i = 0; i < kernel_.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    static_cast<Thread&>(fiber) = Thread();
    fiber.index = i;
    fiber.block = &block;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack.start(), kStackBytes);
#endif
    // The tops of stacks lie in different sets of the cache.
    prepare(fiber.context, fiber.stack.start(), kStackBytes - i % 32 * 576, start);
    make_ready(&fiber);
  }
  constexpr int kAlignment = 1024;
  block.shared_bytes = shared_bytes_;
  block.memory.resize(kAlignment + shared_bytes_ + kGuard);
  void* start = block.memory.data();
  std::size_t space = block.memory.size();
  block.shared = static_cast<char*>(std::align(kAlignment, shared_bytes_, start, space));
  poison(block.shared, static_cast<std::size_t>(shared_bytes_));
  block.copies_to.assign(static_cast<std::size_t>(divide_up(shared_bytes_, 4)), 0);
  block.copies = 0;
  std::memset(block.shared + shared_bytes_, kGuardByte, kGuard);
}

void Launch::end(RunningBlock& block) {
  if (!is_guard(block.shared + block.shared_bytes)) throw Error("a block wrote past the end of its shared memory");
}

// When nobody can do anything: what is in the background lands at one of the barriers that somebody waits at.
void Launch::land_something() {
  std::vector<BarrierQueue*> queues;
  for (RunningBlock& block : blocks_)
    for (auto& [place, queue] : block.barriers)
      if (!queue.waiting.empty() && !queue.expected.empty()) queues.push_back(&queue);
  if (queues.empty()) return;
  auto& waiting = queues[random_() % queues.size()]->waiting;
  Thread& thread = *waiting.back().thread;
  waiting.pop_back();
  thread.lands = true;
  wake(thread);
}

void Launch::run() {
  for (RunningBlock& block : blocks_) begin(block, next_++);
  constexpr int kPatience = 100000;
  for (int polls = 0; true;) {
    if (ready_.empty()) land_something();
    if (ready_.empty()) {
      // Blocks that wait for others look again only when nobody else can do anything.
      if (polling_.empty() || ++polls > kPatience) break;
      ready_.swap(polling_);
      for (Fiber* fiber : ready_) fiber->state = State::ready;
    }
    // Mostly one of the warp that met last: it runs ahead of others, and is in the cache.
    const std::size_t some = random_() % 64 == 0 ? ready_.size() : std::min<std::size_t>(ready_.size(), 32);
    std::swap(*(ready_.end() - 1 - random_() % some), ready_.back());
    Fiber& next = *ready_.back();
    ready_.pop_back();
    self = &next;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, next.stack.start(), kStackBytes);
#endif
    emulator_switch(&scheduler_, &next.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    self = nullptr;
    if (!error_.empty()) throw Error(error_);
    if (next.state == State::polling)
      polling_.push_back(&next);
    else
      polls = 0;
    if (next.state == State::finished) {
      auto& block = *static_cast<RunningBlock*>(next.block);
      if (--block.alive == 0) {
        end(block);
        if (next_ < count_) begin(block, next_++);
      }
    }
  }
  for (const RunningBlock& block : blocks_)
    if (block.alive > 0) throw Error("threads wait for ever: " + who_waits());
}

std::string Launch::who_waits() const {
  std::ostringstream text;
  for (const RunningBlock& block : blocks_) {
    if (block.alive == 0) continue;
    text << name(block) << ": ";
    for (int i = 0; i < 16; ++i)
      if (const NumberedBarrier& barrier = block.numbered_barriers[i]; !barrier.waiting.empty())
        text << barrier.arrived << " of " << barrier.threads << " threads at barrier " << i << " (thread "
             << barrier.waiting[0]->index << " first), ";
    for (const auto& [place, queue] : block.barriers)
      if (!queue.waiting.empty())
        text << queue.waiting.size() << " threads (thread " << queue.waiting[0].thread->index << " first) for parity "
             << queue.waiting[0].parity << " of the Barrier at byte " << static_cast<const char*>(place) - block.shared
             << " of shared memory (" << describe_barrier(place) << "), ";
    const auto add_meetings = [&](const char* of, const std::vector<Meeting>& meetings) {
      for (std::size_t i = 0; i < meetings.size(); ++i)
        if (!meetings[i].waiting.empty())
          text << meetings[i].waiting.size() << " threads of " << of << i << " at " << meetings[i].operation << ", ";
    };
    add_meetings("warp ", block.warps);
    add_meetings("warpgroup ", block.warpgroup_meetings);
    for (const Fiber* fiber : polling_)
      if (fiber->block == &block) text << "thread " << fiber->index << " waits for another block, ";
    text << block.threads - block.alive << " threads have ended; ";
  }
  return text.str();
}

}  // namespace

Thread* self = nullptr;

void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  launch->fail(format, arguments);
}

// The last of `count` threads, of which this one is number `place`, does the work.
static void meet(Meeting& meeting, int place, std::size_t count, const char* operation, void* given,
                 void (*work)(void* const* given)) {
  if (meeting.waiting.empty()) {
    meeting.operation = operation;
    meeting.work = work;
  } else if (meeting.work != work) {
    fail("is at %s, while thread %d is at %s", operation, meeting.waiting[0]->index, meeting.operation);
  }
  meeting.given[place] = given;
  if (meeting.waiting.size() + 1 < count) {
    meeting.waiting.push_back(&launch->fiber());
    launch->leave(State::waiting);
  } else {
    work(meeting.given);
    for (Fiber* other : meeting.waiting) launch->make_ready(other);
    meeting.waiting.clear();
  }
}

void meet_warp(const char* operation, void* given, void (*work)(void* const* given)) {
  auto& block = *static_cast<RunningBlock*>(self->block);
  meet(block.warps[self->index / 32], self->lane(), 32, operation, given, work);
}

void meet_warpgroup(const char* operation, void* given, void (*work)(void* const* given)) {
  auto& block = *static_cast<RunningBlock*>(self->block);
  meet(block.warpgroup_meetings[self->index / 128], self->index % 128, 128, operation, given, work);
}

void meet_block(int id, int threads) {
  if (!self->barriers_are_fenced) fail("is at barrier %d between init and fence_barriers", id);
  NumberedBarrier& barrier = static_cast<RunningBlock*>(self->block)->numbered_barriers[id];
  if (barrier.arrived == 0)
    barrier.threads = threads;
  else if (barrier.threads != threads)
    fail("barrier %d of %d threads; others said %d", id, threads, barrier.threads);
  if (++barrier.arrived < threads) {
    barrier.waiting.push_back(&launch->fiber());
    launch->leave(State::waiting);
  } else {
    for (Fiber* other : barrier.waiting) launch->make_ready(other);
    barrier.waiting.clear();
    barrier.arrived = 0;
  }
}

void let_others_go_first() { launch->step_back(); }

void sleep() { launch->leave(State::waiting); }
void wake(Thread& thread) { launch->make_ready(static_cast<Fiber*>(&thread)); }

void wait_for_others() { launch->leave(State::polling); }

std::map<std::string, EmulatedKernel>& kernels() {
  static std::map<std::string, EmulatedKernel> all;
  return all;
}

std::string without_spaces(const std::string& text) {
  std::string rest = text;
  std::erase(rest, ' ');
  return rest;
}

}  // namespace emulator

using emulator::kGuard;

void* EmulatedStream::allocate(std::size_t bytes) {
  constexpr std::size_t kAlignment = 256;
  Memory memory;
  std::size_t space = kGuard + bytes + kGuard + kAlignment;
  memory.bytes.reset(new unsigned char[space]);
  std::memset(memory.bytes.get(), emulator::kGuardByte, space);
  memory.size = bytes;
  void* start = memory.bytes.get() + kGuard;
  space -= kGuard;
  memory.start = static_cast<unsigned char*>(std::align(kAlignment, bytes, start, space));
  emulator::poison(memory.start, bytes);
  memory_.push_back(std::move(memory));
  return memory_.back().start;
}

std::size_t EmulatedStream::allocated_bytes() const {
  std::size_t bytes = 0;
  for (const Memory& memory : memory_) bytes += memory.size;
  return bytes;
}

void EmulatedStream::zero(void* memory, std::size_t bytes) { std::memset(memory, 0, bytes); }

TensorMap EmulatedStream::tensor_map(const TensorBoxes& boxes) const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw Error(std::string("tensor_map: ") + what);
  };
  require(arch_ >= 90, "no copy engine");
  require(reinterpret_cast<std::uintptr_t>(boxes.rows.data) % 16 == 0, "not aligned");
  const i64 strides[] = {boxes.rows.batch, boxes.rows.position, boxes.rows.head};
  for (int i = 0; i < 4; ++i) require(boxes.size[i] > 0, "no elements");
  for (int i = 0; i < 3; ++i)
    require(boxes.size[i] == 1 || (strides[i] > 0 && strides[i] % 8 == 0 && strides[i] < i64{1} << 39), "a stride");
  require(boxes.positions > 0 && boxes.positions <= 256 && boxes.heads > 0 && boxes.heads <= 256, "the box");
  return map_of(boxes);
}

void EmulatedStream::check_guards(const std::string& after) const {
  for (const Memory& memory : memory_)
    if (!emulator::is_guard(memory.start - kGuard) || !emulator::is_guard(memory.start + memory.size))
      throw Error(after + " wrote outside of " + std::to_string(memory.size) + " bytes that were allocated");
}

void EmulatedStream::launch_bytes(const Kernel& kernel, Grid grid, int threads, int shared_bytes, const void* params,
                                  std::size_t params_bytes) {
  const auto found = emulator::kernels().find(emulator::without_spaces(kernel.name));
  if (found == emulator::kernels().end())
    throw Error("not emulated: EMULATE(" + kernel.name + ");  // " + kernel.header);
  const emulator::EmulatedKernel& emulated = found->second;
  const auto require = [&](bool holds, const char* what) {
    if (!holds) throw Error(kernel.name + ": " + what);
  };
  require(params_bytes == emulated.params_bytes, "other parameters");
  require(threads == emulated.threads && threads % 32 == 0 && threads <= 1024, "number of threads");
  require(shared_bytes >= 0 && shared_bytes <= shared_capacity(arch_), "more shared memory than there is");
  require(grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535, "too many blocks");
  launched_.push_back(kernel.name);

  constexpr int kMostThreads = 4096;
  const int resident = most(least(multiprocessors_ * emulated.blocks_per_multiprocessor, kMostThreads / threads), 1);
  emulator::Launch launch(emulated, grid, shared_bytes, params, resident, seed_++);
  emulator::launch = &launch;
  try {
    launch.run();
  } catch (const Error& error) {
    throw Error(kernel.name + ": " + error.what());
  }
  check_guards(kernel.name);
}

}  // namespace flash_dmattn::cuda
