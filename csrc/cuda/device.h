// What every CUDA kernel is made of, for sm_80 and newer. nvcc takes nvidia.h, where all inline PTX lives; a plain C++
// compiler takes emulated/device.h, which runs the same sources on the CPU: every thread a fiber, every collective a
// meeting. Both offer, besides what is below,
//
//   on the host
//     Grid{x, y, z}                            blocks; y and z at most 65,535
//     launch(kernel, grid, threads, shared_bytes, stream, arguments...) -> error number, 0 when it was launched
//     resident_blocks(kernel, threads, shared_bytes)   how many blocks run at the same time, for persistent kernels
//     max_shared_bytes()                       what a block may ask for; both throw where the device does not say
//     error_text(number)
//   of a thread; blocks are one-dimensional and whole warps
//     thread_index(), num_threads(), block_x/y/z(), grid_x/y/z()
//     shared_memory()                          unsigned char*, 128-byte aligned, as launch was asked for; uninitialised
//     flip(shared, bits)                       an address in shared memory with these bits the other way round
//     sync_threads(), sync_warp()              every thread of the block, of the warp, in the same place
//     exp2_approx(x)                           2^x within 2 units in the last place; 0 for -infinity
//     rounded_product(x, y)                    x y, which does not become part of a multiply-add
//     load(pointer), store(pointer, value)     one access, of a Vec16 too
//     load_once(pointer), store_once(pointer, value)   the same, of what nobody reads again soon
//     prefetch(pointer)                        64 bytes are to be in L2 when they are loaded; nothing waits for them
//     only_now(x)                              x, but nothing found from it is made before, which would take registers
//     count_bits(unsigned)
//   of a warp, all 32 lanes together
//     shuffle(value, from), shuffle_xor(value, mask)       int, unsigned, float, double
//     ballot(condition)                        bit i: lane i's condition
//     ldmatrix<N, kTransposed>(registers[N], row)   N = 1, 2, 4 matrices of 8 x 8 two-byte numbers from shared memory;
//                                              lane 8 m + i gives the address of the 16 bytes of row i of matrix m
//     mma_m16n8k16<bf16 or fp16>(d[4], a[4], b[2])  d += a b, accumulated in float, fragments as PTX lays them out
//   copies to shared memory that the thread does not wait for; 16-byte aligned there, as wide as they are in memory
//     cp_async<8 or 16>(shared, global, valid) zeros, and global is not read, where valid is false
//     cp_async_commit(), cp_async_wait<N>()    all but the N newest groups of this thread have arrived; others see
//                                              them after sync_threads()
//     round_to<bf16 or fp16>(x), to_float(x), pack2<T>(low, high), unpack2<T>(bits, low, high)
#pragma once

#include <cstdint>

#include "scalars.h"
#ifdef __CUDACC__
#include "nvidia.h"
#else
#include "emulated/device.h"
#endif

namespace pcl {

inline constexpr int kWarp = 32;
inline constexpr int kInvalidValue = 1;  // the error number of what there is no kernel for

// Of unsigned numbers: what is found from them by dividing then takes shifts alone.
__device__ __forceinline__ int lane_index() { return static_cast<unsigned>(thread_index()) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<unsigned>(thread_index()) / kWarp; }

// Sum over runs of kWidth neighbouring lanes, a power of two; every lane gets it. The order of adding is fixed.
template <int kWidth = kWarp, class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int mask = 1; mask < kWidth; mask *= 2) value += shuffle_xor(value, mask);
  return value;
}

template <int kWidth = kWarp>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int mask = 1; mask < kWidth; mask *= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

// value, moved to the nearer end of low..high; low where high is below it. For indices read from memory that nobody
// has checked.
template <class T>
__host__ __device__ __forceinline__ T clamp(T value, T low, T high) {
  value = value < high ? value : high;
  return value > low ? value : low;
}

}  // namespace pcl
