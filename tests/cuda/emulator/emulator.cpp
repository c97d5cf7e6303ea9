#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class State { kRuns, kAtBarrier, kInWarp, kDone };

// One thread of a block. `resume` holds what __builtin_setjmp saves.
struct Thread {
  dim3 index;
  unsigned lane = 0;
  State state = State::kRuns;
  std::source_location where;
  uint32_t mask = 0;
  unsigned source_lane = 0;
  uint64_t given = 0, received = 0;
  bool started = false;
  void* resume[5];
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
};

unsigned chosen_order = 0;
std::string message;

// The block that runs. Its memory is kept for the next one.
std::vector<std::unique_ptr<Thread>> threads;
Thread* current = nullptr;
const std::function<void()>* body = nullptr;
std::unique_ptr<char[]> shared;
void* scheduler_resume[5];
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

// AddressSanitizer has to be told which stack is in use.
void leave_for([[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
#endif
}
void arrive([[maybe_unused]] const void** stack, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, stack, bytes);
#endif
}

[[gnu::noinline]] void jump(void** target) { __builtin_longjmp(target, 1); }

[[gnu::noinline]] void suspend(State state, std::source_location where) {
  current->state = state;
  current->where = where;
  leave_for(scheduler_stack, scheduler_stack_bytes);
  if (__builtin_setjmp(current->resume) == 0) jump(scheduler_resume);
  arrive(&scheduler_stack, &scheduler_stack_bytes);
}

void run_thread() {
  arrive(&scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  current->state = State::kDone;
  leave_for(scheduler_stack, scheduler_stack_bytes);
  jump(scheduler_resume);
}

[[gnu::noinline]] void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  leave_for(thread.stack.get(), kStackBytes);
  if (__builtin_setjmp(scheduler_resume) == 0) {
    if (thread.started) jump(thread.resume);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, run_thread, 0);
    setcontext(&thread.context);
  }
  arrive(nullptr, nullptr);
}

std::string describe(const dim3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string describe(const Thread& thread) {
  std::string text = "thread " + describe(thread.index) + " of block " + describe(blockIdx);
  if (thread.state == State::kDone) return text + " has left the kernel";
  return text + (thread.state == State::kAtBarrier ? " waits for the block at " : " waits for its warp at ") +
         thread.where.file_name() + ":" + std::to_string(thread.where.line());
}

struct Fault {
  std::string text;
};

bool same_place(const Thread& a, const Thread& b) {
  return a.where.line() == b.where.line() && std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

// Lets the lanes waiting with thread `i` go on if all of them have come; says whether they have.
bool release_lanes(size_t i) {
  const Thread& first = *threads[i];
  const size_t warp = i / kWarp * kWarp;
  std::vector<Thread*> lanes(kWarp, nullptr);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(first.mask >> lane & 1) || warp + lane >= threads.size()) continue;
    Thread& other = *threads[warp + lane];
    if (other.state == State::kRuns) return false;
    if (other.state != State::kInWarp) throw Fault{"the lanes of a warp diverge: " + describe(first) + ", " + describe(other)};
    if (other.mask != first.mask || !same_place(first, other)) {
      throw Fault{"the lanes of a warp meet in different places: " + describe(first) + ", " + describe(other)};
    }
    lanes[lane] = &other;
  }
  if (!lanes[first.lane]) throw Fault{"not in its own mask: " + describe(first)};
  for (Thread* thread : lanes) {
    if (!thread) continue;
    if (!lanes[thread->source_lane]) throw Fault{"a value was asked of a lane outside the mask: " + describe(*thread)};
    thread->received = lanes[thread->source_lane]->given;
  }
  for (Thread* thread : lanes) {
    if (thread) thread->state = State::kRuns;
  }
  return true;
}

// Lets those go on who wait for nobody any more; false if all threads are done.
bool release() {
  bool released = false, done = true;
  for (size_t i = 0; i < threads.size(); ++i) {
    if (threads[i]->state == State::kInWarp) released |= release_lanes(i);
    done &= threads[i]->state == State::kDone;
  }
  if (released || done) return released;
  const Thread& first = *threads.front();
  for (const auto& thread : threads) {
    if (thread->state != State::kAtBarrier || first.state != State::kAtBarrier || !same_place(first, *thread)) {
      throw Fault{"a barrier is not met by the whole block: " + describe(first) + ", " + describe(*thread)};
    }
  }
  for (const auto& thread : threads) thread->state = State::kRuns;
  return true;
}

void arrange(std::vector<size_t>& sequence, std::mt19937& random) {
  if (chosen_order == 1) std::reverse(sequence.begin(), sequence.end());
  if (chosen_order > 1) std::shuffle(sequence.begin(), sequence.end(), random);
}

std::vector<size_t> numbers(size_t count) {
  std::vector<size_t> sequence(count);
  std::iota(sequence.begin(), sequence.end(), size_t{0});
  return sequence;
}

void run_block(size_t shared_bytes, std::mt19937& random) {
  // exactly as many bytes as were asked for, so that AddressSanitizer sees the end; all ones are NaN in every format
  shared = std::make_unique_for_overwrite<char[]>(shared_bytes);
  std::fill_n(shared.get(), shared_bytes, '\xff');
  for (size_t i = 0; i < threads.size(); ++i) {
    const unsigned rank = static_cast<unsigned>(i);
    threads[i]->index = {rank % blockDim.x, rank / blockDim.x % blockDim.y, rank / (blockDim.x * blockDim.y)};
    threads[i]->lane = rank % kWarp;
    threads[i]->state = State::kRuns;
    threads[i]->started = false;
  }
  std::vector<size_t> sequence = numbers(threads.size());
  arrange(sequence, random);
  do {
    if (chosen_order > 1) arrange(sequence, random);
    for (const size_t i : sequence) {
      if (threads[i]->state == State::kRuns) resume(*threads[i]);
    }
  } while (release());
}

}  // namespace

void set_order(unsigned order) { chosen_order = order; }
const char* error() { return message.c_str(); }
unsigned lane() { return current->lane; }
void* shared_memory() { return shared.get(); }

void barrier(std::source_location where) { suspend(State::kAtBarrier, where); }

uint64_t exchange(uint32_t mask, uint64_t value, unsigned source_lane, std::source_location where) {
  current->mask = mask;
  current->given = value;
  current->source_lane = source_lane;
  suspend(State::kInWarp, where);
  return current->received;
}

uint32_t ballot(uint32_t mask, bool predicate, std::source_location where) {
  const unsigned own = current->lane;
  uint32_t votes = 0;
  for (unsigned source = 0; source < kWarp; ++source) {
    if (mask >> source & 1) votes |= static_cast<uint32_t>(exchange(mask, predicate, source, where)) << source;
  }
  return mask >> own & 1 ? votes : 0;
}

bool launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const size_t count = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
  if (count < 1 || count > 1024 || blocks < 1 || grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
    message = "no GPU runs " + describe(grid) + " blocks of " + describe(block) + " threads";
    return false;
  }
  while (threads.size() < count) threads.push_back(std::make_unique<Thread>());
  threads.resize(count);
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  std::mt19937 random(chosen_order);
  std::vector<size_t> sequence = numbers(blocks);
  arrange(sequence, random);
  try {
    for (const size_t i : sequence) {
      blockIdx.x = static_cast<unsigned>(i % grid.x);
      blockIdx.y = static_cast<unsigned>(i / grid.x % grid.y);
      blockIdx.z = static_cast<unsigned>(i / grid.x / grid.y);
      run_block(shared_bytes, random);
    }
  } catch (const Fault& fault) {
    message = fault.text;
    return false;
  }
  return true;
}

}  // namespace emulator
