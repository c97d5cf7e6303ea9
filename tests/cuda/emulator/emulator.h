// Runs CUDA kernels as ordinary C++ on one thread of the CPU, for tests on small problems.
//
// The threads of a block are fibers. Each runs until it meets a barrier or a warp intrinsic, and goes on when all threads that
// have to meet it there have come; blocks run one after the other. What CUDA leaves undefined is an error of the launch here:
//   - a barrier that some threads of the block do not reach, or at which they wait in different places;
//   - a warp intrinsic that some lanes of its mask do not reach, or that is asked for the value of a lane outside it;
//   - more shared memory than the launch may have, or a grid too large.
// Shared memory is NaN before each block, and the order of threads and blocks can be chosen: a result that changes with it shows
// a missing barrier. Compiled with -fsanitize=address,undefined, reads and writes out of bounds end the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// 0: threads and blocks in their order, 1: in reverse, others: shuffled from this seed at every barrier.
void set_order(unsigned order);
// What was wrong with the last launch that failed.
const char* error();

// Whether all blocks ran to their end.
bool launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// Of the thread that runs.
unsigned lane();
void* shared_memory();

void barrier(std::source_location where);
// The value of `source_lane` among the lanes of `mask`; all of them have to call it in the same place.
uint64_t exchange(uint32_t mask, uint64_t value, unsigned source_lane, std::source_location where);
// The lanes of `mask` whose predicate holds.
uint32_t ballot(uint32_t mask, bool predicate, std::source_location where);

}  // namespace emulator
