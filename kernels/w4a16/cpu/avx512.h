// Vectors of AVX-512 for forward.h, backward.h and quantize.h. Included inside an unnamed namespace, after immintrin.h.

struct Avx512 {
  using Words = __m512i;
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 6, kVectors = 2;            // of the integer tile: 24 sums with two planes
  static constexpr bool kOneRowInPairs = false;
  static constexpr int kFloatRows = 6, kFloatVectors = 4;  // of the backward one
  static constexpr int kTurnedRows = 8;                    // and of the one with pairs: compilers spill some of 24 sums

  static Words load_words(const uint16_t* from, int valid) {
    return valid >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((1u << valid) - 1, from);
  }
  static void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }
  // Words of four rows -> 16 columns' bytes (row 0..3) for each slice; half 0 has columns 0-3, 8-11, 16-19, 24-27.
  static void split(const Words* row, int half, Words* slices) {
    const Words even = half ? _mm512_unpackhi_epi16(row[0], row[2]) : _mm512_unpacklo_epi16(row[0], row[2]);
    const Words odd = half ? _mm512_unpackhi_epi16(row[1], row[3]) : _mm512_unpacklo_epi16(row[1], row[3]);
    const Words low = _mm512_set1_epi32(0x00FF00FF), nibble = _mm512_set1_epi8(15);
    const Words first = _mm512_ternarylogic_epi32(low, even, _mm512_slli_epi32(odd, 8), 0xCA);  // low ? even : odd
    const Words second = _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(even, 8), odd, 0xCA);
    slices[0] = _mm512_and_si512(first, nibble);
    slices[1] = _mm512_and_si512(_mm512_srli_epi32(first, 4), nibble);
    slices[2] = _mm512_and_si512(second, nibble);
    slices[3] = _mm512_and_si512(_mm512_srli_epi32(second, 4), nibble);
  }
  static void store_bytes(uint8_t* to, Words bytes) { _mm512_store_si512(to, bytes); }
  static Words load_bytes(const void* from) { return _mm512_load_si512(from); }
  static Words broadcast4(const void* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
  }

  template <int PLANES>
  struct Sum {
    __m512i plane_sum[PLANES];
    void clear() {
      for (__m512i& sum : plane_sum) sum = _mm512_setzero_si512();
    }
    void add(int plane, Words weights, Words x) {
      plane_sum[plane] = _mm512_dpbusd_epi32(plane_sum[plane], weights, x);
    }
    void end_piece() {}
    void merge(const Sum& other) {
      for (int i = 0; i < PLANES; ++i) plane_sum[i] = _mm512_add_epi32(plane_sum[i], other.plane_sum[i]);
    }
    F to_float() const {
      if constexpr (PLANES == 1) return _mm512_cvtepi32_ps(plane_sum[0]);
      else return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(plane_sum[0], 8), plane_sum[1]));
    }
  };

  // Columns 0-15, 16-31 <-> the two halves of `split`.
  static void to_split(F& low, F& high) {
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    permute(low, high, even, odd);
  }
  static void from_split(F& low, F& high) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    permute(low, high, first, last);
  }
  static void permute(F& low, F& high, __m512i first, __m512i last) {
    const __m512d a = _mm512_castps_pd(low), b = _mm512_castps_pd(high);
    low = _mm512_castpd_ps(_mm512_permutex2var_pd(a, first, b));
    high = _mm512_castpd_ps(_mm512_permutex2var_pd(a, last, b));
  }

  static F zero_f() { return _mm512_setzero_ps(); }
  static F load_f(const float* from) { return _mm512_loadu_ps(from); }
  static F load_f16(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static F load_bf16(const uint16_t* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static void store_f(float* to, F value) { _mm512_storeu_ps(to, value); }
  static F broadcast(float value) { return _mm512_set1_ps(value); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F neg_mul(F a, F b) { return _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, b)); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F load_first(const float* from, int count) {  // 16, the missing ones zero
    return count >= kLanes ? load_f(from) : _mm512_maskz_loadu_ps(count > 0 ? (1u << count) - 1 : 0, from);
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static float sum_of(F v) { return _mm512_reduce_add_ps(v); }
  static F to_float(Words v) { return _mm512_cvtepi32_ps(v); }
  static Words to_nearest(F v) { return _mm512_cvtps_epi32(v); }
  static Words pack(Words a, Words b) { return _mm512_packs_epi32(a, b); }
  static Words zero_words() { return _mm512_setzero_si512(); }
  static void store_words(int16_t* to, Words words) { _mm512_store_si512(to, words); }
  static Words add_pairs(Words sum, Words a, Words b) { return _mm512_dpwssd_epi32(sum, a, b); }
  template <int HALF>
  static Words interleave(Words a, Words b) {
    return HALF ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
  }
  static Words nibbles_of(Words words, int shift) {
    return _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift)), _mm512_set1_epi16(15));
  }
  static Words join_nibbles(Words high, Words low) {  // 16 high + low - 128
    return _mm512_sub_epi16(_mm512_or_si512(_mm512_slli_epi16(high, 4), low), _mm512_set1_epi16(128));
  }
  static void turn(Words* r) {  // 16 x 16 lanes of 32 bits
    Words t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
        r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
      }
    for (int i = 0; i < 4; ++i) {  // r[4 a + i] holds rows 4 a .. 4 a + 3 of columns i, 4 + i, 8 + i, 12 + i
      t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
      t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
      t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
      r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
      r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
      r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
  }
  // The low or high nibbles of 16 bytes.
  static F nibbles(const uint8_t* from, bool high) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, high ? 4 : 0), _mm512_set1_epi32(15)));
  }
  // The nibbles at bit `shift` of 16 words.
  static F nibbles16(const uint16_t* from, int shift) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(words, shift), _mm512_set1_epi32(15)));
  }
};
