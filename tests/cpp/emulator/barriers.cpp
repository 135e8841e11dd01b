#include "barriers.h"

#include <algorithm>
#include <cstring>

#include "threads.h"

namespace flash_dmattn::cuda::emulator {

namespace {

constexpr u64 kTag = 0xba44;  // no poison
constexpr int kMostArrivals = 4095, kMostBytes = (1 << 20) - 1;

/// The 8 bytes of a barrier.
struct State {
  u64 tag : 16, arrivals : 12, missing : 12, parity : 1;
  i64 bytes : 22;  // announced, and not there yet
};
static_assert(sizeof(State) == 8);

State load(const void* barrier) {
  State state;
  std::memcpy(&state, barrier, sizeof state);
  return state;
}

State checked(const char* operation, const void* barrier) {
  require_aligned(operation, barrier, 8);
  require_shared(operation, barrier, 8);
  const State state = load(barrier);
  if (state.tag != kTag) fail("%s: at a Barrier without init", operation);
  return state;
}

// Stores; a complete phase ends. Says whether one did.
bool store(void* barrier, State state) {
  const bool is_complete = state.missing == 0 && state.bytes == 0;
  if (is_complete) {
    state.missing = state.arrivals;
    state.parity ^= 1;
  }
  std::memcpy(barrier, &state, sizeof state);
  if (is_complete) {
    auto& waiting = self->block->barriers[barrier].waiting;
    for (const BarrierQueue::Waiting& one : waiting) wake(*one.thread);
    waiting.clear();
  }
  return is_complete;
}

bool count_arrival(const char* operation, void* barrier, int bytes) {
  State state = checked(operation, barrier);
  if (bytes < 0 || state.bytes + bytes > kMostBytes) fail("%s: %d bytes", operation, bytes);
  if (state.missing == 0) fail("%s: more than %d arrivals in a phase", operation, static_cast<int>(state.arrivals));
  --state.missing;
  state.bytes += bytes;
  return store(barrier, state);
}

bool is_arrival_at(const Copy& copy, const void* barrier) { return copy.bytes == 0 && copy.shared == barrier; }

// What is under way to the barrier, until its phase is complete.
void land(void* barrier, int parity) {
  auto& expected = self->block->barriers[barrier].expected;
  while (!expected.empty() && load(barrier).parity == static_cast<u64>(parity)) {
    const BarrierQueue::Expected next = expected.front();
    expected.pop_front();
    if (next.thread) {
      auto& copies = next.thread->copies;
      const auto is_it = [&](const Copy& copy) { return is_arrival_at(copy, barrier); };
      if (std::none_of(copies.begin(), copies.end(), is_it)) continue;  // the thread itself has waited for it
      while (!is_it(copies.front())) land_first_copy(*next.thread);
      land_first_copy(*next.thread);
    } else {
      if (may_land(next.shared, next.bytes, next.number))
        std::memcpy(next.shared, next.global, static_cast<std::size_t>(next.bytes));
      State state = load(barrier);
      state.bytes -= next.bytes;
      store(barrier, state);
    }
  }
}

}  // namespace

void init_barrier(void* barrier, int arrivals) {
  require_aligned("init", barrier, 8);
  require_shared("init", barrier, 8);
  if (arrivals < 1 || arrivals > kMostArrivals) fail("init: %d arrivals", arrivals);
  if (load(barrier).tag == kTag) fail("init: of a Barrier that is one already");
  const auto count = static_cast<u64>(arrivals);
  const State state = {.tag = kTag, .arrivals = count & 0xfff, .missing = count & 0xfff, .parity = 0, .bytes = 0};
  std::memcpy(barrier, &state, sizeof state);
  self->barriers_are_fenced = false;
}

void arrive_at_barrier(const char* operation, void* barrier, int bytes) {
  if (count_arrival(operation, barrier, bytes)) let_others_go_first();
}

void arrive_at_barrier_after_copies(void* barrier) {
  checked("arrive_after_copies", barrier);
  self->copies.push_back({barrier, nullptr, 0, false, self->groups, 0});
  self->block->barriers[barrier].expected.push_back({self, nullptr, nullptr, 0, 0});
}

void load_to_barrier(void* shared, const void* global, int bytes, void* barrier) {
  checked("bulk_load", barrier);
  self->block->barriers[barrier].expected.push_back({nullptr, shared, global, bytes, begin_copy(shared, bytes)});
}

bool is_complete(void* barrier, int parity) {
  return checked("is_complete", barrier).parity != static_cast<u64>(parity);
}

void wait_at_barrier(void* barrier, int parity) {
  if (parity != 0 && parity != 1) fail("wait: for parity %d", parity);
  while (checked("wait", barrier).parity == static_cast<u64>(parity)) {
    self->block->barriers[barrier].waiting.push_back({self, parity});
    sleep();
    if (self->lands) land(barrier, parity);
    self->lands = false;
  }
}

static int* copies_to(const void* shared) {
  return &self->block->copies_to[static_cast<std::size_t>(static_cast<const char*>(shared) - self->block->shared) / 4];
}
int begin_copy(void* shared, int bytes) {
  poison(shared, static_cast<std::size_t>(bytes));
  std::fill_n(copies_to(shared), bytes / 4, ++self->block->copies);
  return self->block->copies;
}
bool may_land(const void* shared, int bytes, int number) {
  const int* const last = copies_to(shared);
  return std::all_of(last, last + bytes / 4, [&](int copy) { return copy == number; });
}

std::string describe_barrier(const void* barrier) {
  const State state = load(barrier);
  return "which lacks " + std::to_string(state.missing) + " of " + std::to_string(state.arrivals) + " arrivals and " +
         std::to_string(state.bytes) + " bytes";
}

void land_first_copy(Thread& thread) {
  const Copy copy = thread.copies.front();
  thread.copies.pop_front();
  if (copy.bytes == 0)
    count_arrival("arrive_after_copies", copy.shared, 0);
  else if (!may_land(copy.shared, copy.bytes, copy.number))
    return;
  else if (copy.valid)
    std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.bytes));
  else
    std::memset(copy.shared, 0, static_cast<std::size_t>(copy.bytes));
}

}  // namespace flash_dmattn::cuda::emulator
