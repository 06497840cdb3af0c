// x86-64 with AVX2, FMA and F16C: Intel from Haswell on, AMD from Zen on.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "plan.h"

namespace w4a16 {
namespace {

struct Avx2 {
  using Words = __m256i;
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2, kVectors = 2;            // of the integer tile: 8 + 4 sums with two planes
  static constexpr bool kOneRowInPairs = true;             // with fewer instructions than two planes of bytes
  static constexpr int kFloatRows = 6, kFloatVectors = 2;  // of the backward one
  static constexpr int kTurnedRows = 6;                    // and of the one with pairs

  static Words load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static Words load_words(const uint16_t* from, int) { return load(from); }  // rows are whole multiples of 16 words
  static void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }
  // Words of four rows -> 8 columns' bytes (row 0..3) for each slice; half 0 has columns 0-3 and 8-11.
  static void split(const Words* row, int half, Words* slices) {
    const Words even = half ? _mm256_unpackhi_epi16(row[0], row[2]) : _mm256_unpacklo_epi16(row[0], row[2]);
    const Words odd = half ? _mm256_unpackhi_epi16(row[1], row[3]) : _mm256_unpacklo_epi16(row[1], row[3]);
    const Words low = _mm256_set1_epi32(0x00FF00FF), nibble = _mm256_set1_epi8(15);
    const Words first = _mm256_or_si256(_mm256_and_si256(low, even), _mm256_slli_epi16(odd, 8));
    const Words second = _mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_andnot_si256(low, odd));
    slices[0] = _mm256_and_si256(first, nibble);
    slices[1] = _mm256_and_si256(_mm256_srli_epi32(first, 4), nibble);
    slices[2] = _mm256_and_si256(second, nibble);
    slices[3] = _mm256_and_si256(_mm256_srli_epi32(second, 4), nibble);
  }
  static void store_bytes(uint8_t* to, Words bytes) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), bytes); }
  static Words load_bytes(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
  static Words broadcast4(const void* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
  }

  // A piece's eight products of two pairs stay in 16 bits: 8 * 2 * 15 * 128 = 30720.
  template <int PLANES>
  struct Sum {
    __m256i piece_sum[PLANES], sum;
    void clear() {
      sum = _mm256_setzero_si256();
      for (__m256i& narrow : piece_sum) narrow = _mm256_setzero_si256();
    }
    void add(int plane, Words weights, Words x) {
      piece_sum[plane] = _mm256_add_epi16(piece_sum[plane], _mm256_maddubs_epi16(weights, x));
    }
    void end_piece() {
      if constexpr (PLANES == 2)
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(piece_sum[0], _mm256_set1_epi16(256)));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(piece_sum[PLANES - 1], _mm256_set1_epi16(1)));
      for (__m256i& narrow : piece_sum) narrow = _mm256_setzero_si256();
    }
    void merge(const Sum& other) { sum = _mm256_add_epi32(sum, other.sum); }
    F to_float() const { return _mm256_cvtepi32_ps(sum); }
  };

  // Columns 0-7, 8-15 <-> the two halves of `split`: both ways the same exchange.
  static void to_split(F& low, F& high) {
    const F first = low;
    low = _mm256_permute2f128_ps(first, high, 0x20);
    high = _mm256_permute2f128_ps(first, high, 0x31);
  }
  static void from_split(F& low, F& high) { to_split(low, high); }

  static F zero_f() { return _mm256_setzero_ps(); }
  static F load_f(const float* from) { return _mm256_loadu_ps(from); }
  static F load_f16(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static F load_bf16(const uint16_t* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store_f(float* to, F value) { _mm256_storeu_ps(to, value); }
  static F broadcast(float value) { return _mm256_set1_ps(value); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F neg_mul(F a, F b) { return _mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(a, b)); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F at(__m256i lanes, int shift) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(lanes, shift), _mm256_set1_epi32(15)));
  }
  static F load_first(const float* from, int count) {  // 8, the missing ones zero
    if (count >= kLanes) return load_f(from);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static float sum_of(F v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static F to_float(Words v) { return _mm256_cvtepi32_ps(v); }
  static Words to_nearest(F v) { return _mm256_cvtps_epi32(v); }
  static Words pack(Words a, Words b) { return _mm256_packs_epi32(a, b); }
  static Words zero_words() { return _mm256_setzero_si256(); }
  static void store_words(void* to, Words words) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), words); }
  static Words add_pairs(Words sum, Words a, Words b) {
    // In order and in place: compilers else make many products before they add them, for which registers do not suffice.
    asm volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(a, b)));
    return sum;
  }
  template <int HALF>
  static Words interleave(Words a, Words b) {
    return HALF ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
  }
  static Words add_ints(Words a, Words b) { return _mm256_add_epi32(a, b); }
  static Words sixteenth(Words ints) { return _mm256_srai_epi32(ints, 4); }
  static Words upper_bytes(Words words) { return _mm256_srli_epi16(words, 8); }
  static Words nibbles_in_place(Words words, bool upper) {
    return _mm256_and_si256(words, _mm256_set1_epi16(upper ? 0xF0 : 0x0F));
  }
  static Words nibbles_of(Words words, int shift) {
    return _mm256_and_si256(_mm256_srl_epi32(words, _mm_cvtsi32_si128(shift)), _mm256_set1_epi16(15));
  }
  static Words join_nibbles(Words high, Words low) {  // 16 high + low - 128
    return _mm256_sub_epi16(_mm256_or_si256(_mm256_slli_epi16(high, 4), low), _mm256_set1_epi16(128));
  }
  static void turn(Words* r) {  // 8 x 8 lanes of 32 bits
    Words t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + 2 + j]);
        r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + 2 + j]);
      }
    for (int i = 0; i < 4; ++i) {  // r[4 a + i] holds rows 4 a .. 4 a + 3 of columns i, 4 + i
      const Words low = _mm256_permute2x128_si256(r[i], r[4 + i], 0x20);
      r[4 + i] = _mm256_permute2x128_si256(r[i], r[4 + i], 0x31);
      r[i] = low;
    }
  }
  // The low or high nibbles of 8 bytes.
  static F nibbles(const uint8_t* from, bool high) {
    return at(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), high ? 4 : 0);
  }
  // The nibbles at bit `shift` of 8 words.
  static F nibbles16(const uint16_t* from, int shift) {
    return at(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), shift);
  }
};

#include "quantize.h"
#include "one_row.h"
#include "forward.h"
#include "backward.h"
#include "attend.h"
#include "pairs.h"

}  // namespace

const Kernels kAvx2 = {quantize<int8_t>, forward<Avx2>, backward<Avx2>, attend, &kPairKernels<Avx2>};

}  // namespace w4a16
