#include "trials.h"

#include "cuda/device.h"

namespace pcl::emulated {

namespace {

template <class T, bool kTransposed>
void product_kernel(const T* a, const T* b, float* c, bool wait) {
  T* shared_a = reinterpret_cast<T*>(shared_memory());
  T* shared_b = shared_a + 256;
  const int lane = lane_index();
  cp_async<16>(shared_a + lane * 8, a + lane * 8);
  if (lane < 16) cp_async<16>(shared_b + lane * 8, b + lane * 8);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  sync_threads();
  uint32_t left[4], right[2];
  float d[4] = {};
  ldmatrix<4>(left, shared_a + lane % 16 * 16 + lane / 16 * 8);
  if (kTransposed) {
    ldmatrix<2, true>(right, shared_b + lane % 16 * 8);
  } else {
    ldmatrix<2>(right, shared_b + lane % 8 * 16 + lane / 8 % 2 * 8);
  }
  mma_m16n8k16<T>(d, left, right);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  cp_async_wait<0>();
}

void mistake_kernel(Mistake which, const char* source) {
  unsigned char* shared = shared_memory();
  switch (which) {
    case Mistake::kOneWarpAtABarrier:
      if (warp_index() == 1) sync_threads();
      break;
    case Mistake::kLanesApart:
      if (lane_index() < 16) {
        ballot(true);
      } else {
        shuffle(1, 0);
      }
      break;
    case Mistake::kEarlyEnd:
      if (thread_index() == 40) return;
      sync_threads();
      break;
    case Mistake::kCopyNotWaitedFor:
      cp_async<16>(shared, source);
      cp_async_commit();
      break;
    case Mistake::kCopyPastTheEnd:
      cp_async<16>(shared + 64, source);
      break;
    case Mistake::kCopyNotAligned:
      cp_async<16>(shared, source + 4);
      break;
    case Mistake::kWritePastTheEnd:
      shared[64 + thread_index()] = 1;
      break;
    case Mistake::kPartOfAWarp:
      break;
  }
}

void race_kernel(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[thread_index()] = thread_index();
  out[thread_index()] = shared[num_threads() - 1 - thread_index()];
}

template <class T>
int product_of(const void* a, const void* b, float* c, bool transposed, bool wait) {
  const auto kernel = transposed ? product_kernel<T, true> : product_kernel<T, false>;
  return launch(kernel, {}, 32, 768, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), c, wait);
}

}  // namespace

int product(const void* a, const void* b, float* c, Scalar dtype, bool transposed, bool wait) {
  return dtype == Scalar::kHalf ? product_of<fp16>(a, b, c, transposed, wait)
                                : product_of<bf16>(a, b, c, transposed, wait);
}

int make_mistake(Mistake which, const void* source) {
  const int threads = which == Mistake::kPartOfAWarp ? 40 : 64;
  return launch(mistake_kernel, {}, threads, 64, nullptr, which, static_cast<const char*>(source));
}

int race(int* out) { return launch(race_kernel, {}, 64, 256, nullptr, out); }

}  // namespace pcl::emulated
