// device.h for nvcc: the contracts are there. All inline PTX of the project stands here.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

#include "runtime.h"
#include "scalars.h"

namespace pcl {

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_answer(cudaGetDevice(&device));
  check_answer(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int max_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// As much as there is, whatever is needed now: a limit that falls again would be below what a captured graph asks for.
template <class... Parameters>
int allow_shared(void (*kernel)(Parameters...), int shared_bytes) {
  constexpr int kWithoutAsking = 48 * 1024;
  if (shared_bytes <= kWithoutAsking) return 0;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              max_shared_bytes());
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
           Arguments&&... arguments) {
  if (const int error = allow_shared(kernel, shared_bytes)) return error;
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return std::apply(
      [&](auto&... value) -> int {
        void* pointers[] = {&value..., nullptr};
        return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid.x, grid.y, grid.z), dim3(threads),
                                pointers, shared_bytes, static_cast<cudaStream_t>(stream));
      },
      values);
}

// It does not change and takes microseconds to ask for: every host thread asks once. No answer is no answer next time.
template <class... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, int shared_bytes) {
  thread_local std::map<std::tuple<int, void (*)(Parameters...), int, int>, int> known;
  int device = 0;
  check_answer(cudaGetDevice(&device));
  int& blocks = known[{device, kernel, threads, shared_bytes}];
  if (blocks > 0) return blocks;
  const auto* address = reinterpret_cast<const void*>(kernel);
  int each = 0;
  check_answer(allow_shared(kernel, shared_bytes));
  // As many as fit are there at once only where a multiprocessor's memory is split in favour of shared memory.
  check_answer(
      cudaFuncSetAttribute(address, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  check_answer(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, address, threads, shared_bytes));
  blocks = (each < 1 ? 1 : each) * device_attribute(cudaDevAttrMultiProcessorCount);
  return blocks;
}

inline const char* error_text(int number) { return cudaGetErrorString(static_cast<cudaError_t>(number)); }

__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int num_threads() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int block_y() { return blockIdx.y; }
__device__ __forceinline__ int block_z() { return blockIdx.z; }
__device__ __forceinline__ int grid_x() { return gridDim.x; }
__device__ __forceinline__ int grid_y() { return gridDim.y; }
__device__ __forceinline__ int grid_z() { return gridDim.z; }

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }

__device__ __forceinline__ int count_bits(unsigned bits) { return __popc(bits); }

// x, known from here on: what is found from it takes no registers before.
__device__ __forceinline__ int only_now(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class Unit>
__device__ __forceinline__ Unit load(const Unit* from) {
  if constexpr (std::is_same_v<Unit, Vec16>) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    return {{x.x, x.y, x.z, x.w}};
  } else {
    return *from;
  }
}

template <class Unit>
__device__ __forceinline__ Unit load_once(const Unit* from) {
  if constexpr (std::is_same_v<Unit, Vec16>) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{x.x, x.y, x.z, x.w}};
  } else {
    return *from;
  }
}

template <class Unit>
__device__ __forceinline__ void store(Unit* to, const Unit& x) {
  if constexpr (std::is_same_v<Unit, Vec16>) {
    *reinterpret_cast<uint4*>(to) = make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
  } else {
    *to = x;
  }
}

template <class Unit>
__device__ __forceinline__ void store_once(Unit* to, const Unit& x) {
  if constexpr (std::is_same_v<Unit, Vec16>) {
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]));
  } else {
    *to = x;
  }
}

inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__device__ __forceinline__ T shuffle(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

__device__ __forceinline__ unsigned ballot(bool condition) { return __ballot_sync(kAllLanes, condition); }

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

template <class Byte>
__device__ __forceinline__ Byte* flip(Byte* shared, unsigned bits) {
  return static_cast<Byte*>(__cvta_shared_to_generic(shared_address(shared) ^ bits));
}

template <int kMatrices, bool kTransposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  const unsigned from = shared_address(row);
  if constexpr (kMatrices == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(from) : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(from) : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(from)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
  }
}

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(kBytes == 8 || kBytes == 16);
  const unsigned to = shared_address(shared);
  const int read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  }
}

// Asks for what lies at an address, and 64 bytes with it, to be in L2 when it is loaded.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kNewest>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, fp16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class T>
__device__ __forceinline__ T round_to(float x) {
  return {static_cast<uint16_t>(pack2<T>(x, 0.f))};
}

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

__device__ __forceinline__ float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
__device__ __forceinline__ void unpack2(uint32_t bits, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(bits)});
  high = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

}  // namespace pcl
