#include "../isa.h"

#ifdef PCL_X86
#include <cpuid.h>
#endif
#ifdef PCL_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pcl {
namespace {

#ifdef PCL_X86
// Older compilers have no names for what __builtin_cpu_supports should look for.
[[maybe_unused]] bool cpuid_bits(unsigned subleaf, int registr, unsigned bits) {
  unsigned found[4] = {};
  if (!__get_cpuid_count(7, subleaf, &found[0], &found[1], &found[2], &found[3])) return false;
  return (found[registr] & bits) == bits;
}

bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
#ifdef PCL_AVX512_BF16
  constexpr int kEax = 0;
  return cpuid_bits(1, kEax, 1u << 5);
#else
  return false;
#endif
}

bool has_amx() {
#ifdef PCL_AMX
  constexpr int kEdx = 3;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kTileState = 3u << 17, kXsaveByOs = 1u << 27;
  unsigned eax, ebx, ecx = 0, edx;
  if (!cpuid_bits(0, kEdx, kAmxBf16 | kAmxTile) || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  if (!(ecx & kXsaveByOs)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

Isa best_isa() {
#ifdef PCL_X86
  static const Isa best = [] {
    if (runs_avx512()) {
      if (!has_avx512_bf16()) return Isa::kAvx512;
      return has_amx() ? Isa::kAmx : Isa::kAvx512Bf16;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::kAvx2 : Isa::kBaseline;
  }();
  return best;
#else
  return Isa::kBaseline;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    case Isa::kEmulatedTiles:
      return "emulated tiles";
    default:
      return "baseline";
  }
}

}  // namespace pcl
