// AArch64 with the dot-product extension (Armv8.2-A): Apple M1, Neoverse N1, Cortex-A76 and later.
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "plan.h"

namespace w4a16 {
namespace {

struct Neon {
  using Words = uint8x16_t;
  using F = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 3, kVectors = 4;            // of the integer tile: 24 sums with two planes
  static constexpr bool kOneRowInPairs = false;
  static constexpr int kFloatRows = 6, kFloatVectors = 4;  // of the backward one

  static Words load_words(const uint16_t* from, int) { return vreinterpretq_u8_u16(vld1q_u16(from)); }
  static void prefetch(const void* from) { __builtin_prefetch(from); }
  static Words interleave(Words a, Words b, int half) {
    const uint16x8_t x = vreinterpretq_u16_u8(a), y = vreinterpretq_u16_u8(b);
    return vreinterpretq_u8_u16(half ? vzip2q_u16(x, y) : vzip1q_u16(x, y));
  }
  // Words of four rows -> 4 columns' bytes (row 0..3) for each slice.
  static void split(const Words* row, int half, Words* slices) {
    const Words even = interleave(row[0], row[2], half), odd = interleave(row[1], row[3], half);
    const Words first = vtrn1q_u8(even, odd), second = vtrn2q_u8(even, odd), nibble = vdupq_n_u8(15);
    slices[0] = vandq_u8(first, nibble);
    slices[1] = vshrq_n_u8(first, 4);
    slices[2] = vandq_u8(second, nibble);
    slices[3] = vshrq_n_u8(second, 4);
  }
  static void store_bytes(uint8_t* to, Words bytes) { vst1q_u8(to, bytes); }
  static Words load_bytes(const uint8_t* from) { return vld1q_u8(from); }
  static Words broadcast4(const int8_t* from) {
    uint32_t four;
    std::memcpy(&four, from, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
  }

  template <int PLANES>
  struct Sum {
    int32x4_t plane_sum[PLANES];
    void clear() {
      for (int32x4_t& sum : plane_sum) sum = vdupq_n_s32(0);
    }
    void add(int plane, Words weights, Words x) {
      plane_sum[plane] = vdotq_s32(plane_sum[plane], vreinterpretq_s8_u8(weights), vreinterpretq_s8_u8(x));
    }
    void end_piece() {}
    void merge(const Sum& other) {
      for (int i = 0; i < PLANES; ++i) plane_sum[i] = vaddq_s32(plane_sum[i], other.plane_sum[i]);
    }
    F to_float() const {
      if constexpr (PLANES == 1) return vcvtq_f32_s32(plane_sum[0]);
      else return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(plane_sum[0], 8), plane_sum[1]));
    }
  };

  static void to_split(F&, F&) {}  // the halves of `split` are the columns 0-3 and 4-7
  static void from_split(F&, F&) {}

  static F zero_f() { return vdupq_n_f32(0); }
  static F load_f(const float* from) { return vld1q_f32(from); }
  static F load_f16(const uint16_t* from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
  static F load_bf16(const uint16_t* from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }
  static void store_f(float* to, F value) { vst1q_f32(to, value); }
  static F broadcast(float value) { return vdupq_n_f32(value); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F neg_mul(F a, F b) { return vnegq_f32(vmulq_f32(a, b)); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F at(uint32x4_t lanes, int shift) {
    return vcvtq_f32_u32(vandq_u32(vshlq_u32(lanes, vdupq_n_s32(-shift)), vdupq_n_u32(15)));
  }
  // The low or high nibbles of 4 bytes.
  static F nibbles(const uint8_t* from, bool high) {
    uint32_t four;
    std::memcpy(&four, from, 4);
    const uint16x8_t wide = vmovl_u8(vcreate_u8(four));
    return at(vmovl_u16(vget_low_u16(wide)), high ? 4 : 0);
  }
  // The nibbles at bit `shift` of 4 words.
  static F nibbles16(const uint16_t* from, int shift) { return at(vmovl_u16(vld1_u16(from)), shift); }
};

#include "quantize.h"
#include "one_row.h"
#include "forward.h"
#include "backward.h"
#include "attend.h"

}  // namespace

const Kernels kNeon = {quantize<int8_t>, forward<Neon>, backward<Neon>, attend};

}  // namespace w4a16
