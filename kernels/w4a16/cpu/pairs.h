// Products of many rows by dot products of pairs of 16-bit integers (AVX-512 VNNI), both ways, W in 4 or 8 bits.
//
// Forward is forward.h's arithmetic, operation by operation, but 16-bit x needs no planes here. Backward the sum runs
// over columns, whose scales differ, so dy * s becomes integers, once for each slice of rows: 16 bits with one step for a
// row of dy and kPairColumns columns. A gradient so has a relative error of 2e-4. Included like forward.h, after it.

// The first `count` of 16 lanes.
__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

constexpr int kPairs = kSlice / 2;
constexpr int kTileRows = 6, kTileVectors = 2;  // forward: 12 sums
constexpr int kTurnedRows = 8;                  // backward: 16 sums (compilers spill some of 24)

// quantize.h's, by vectors.
void quantize_pairs(const Plan& plan, int64_t k, const float* x, int64_t first, int64_t last, const Quantized& out) {
  constexpr int kVectors = kSuperblock / 16;
  constexpr float kLimit = 127 * 256 + 127;
  const __m512i half = _mm512_castps_si512(_mm512_set1_ps(0.5f)), sign = _mm512_set1_epi32(INT32_MIN);
  for (int64_t m = first; m < last; ++m)
    for (int64_t b = 0; b < plan.superblocks; ++b) {
      const Superblock& block = plan.superblock[b];
      const float* row = x + m * k + b * kSuperblock;
      __m512 v[kVectors];
      __m512i largest = _mm512_setzero_si512();  // the bits of a positive float grow with it, NaN last
      for (int i = 0; i < kVectors; ++i) {
        v[i] = _mm512_maskz_loadu_ps(first_lanes(k - b * kSuperblock - 16 * i), row + 16 * i);
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(v[i])));
      }
      const uint32_t bits = _mm512_reduce_max_epu32(largest);
      float biggest;
      std::memcpy(&biggest, &bits, 4);
      const bool finite = bits < 0x7f800000u, counts = finite && biggest > 1e-30f;
      const float scale = finite ? (counts ? biggest / kLimit : 0.0f) : NAN;
      const __m512 inverse = _mm512_set1_ps(counts ? kLimit / biggest : 0.0f);
      out.scale[b * out.rows + m] = scale;
      __m512i integer[kVectors];
      for (int i = 0; i < kVectors; ++i) {  // rounds a half away from zero
        const __m512 scaled = finite ? _mm512_mul_ps(v[i], inverse) : _mm512_setzero_ps();
        const __m512i signed_half = _mm512_or_si512(half, _mm512_and_si512(_mm512_castps_si512(scaled), sign));
        integer[i] = _mm512_cvttps_epi32(_mm512_add_ps(scaled, _mm512_castsi512_ps(signed_half)));
      }
      int16_t* to = reinterpret_cast<int16_t*>(out.values) + (block.first_piece * out.rows + m * block.pieces) * kSlice;
      for (int64_t s = block.first_segment; s < block.first_segment + block.segments; ++s) {
        __m512i sum = _mm512_setzero_si512();
        for (int p = plan.segment[s].first_piece; p < plan.segment[s].last_piece; ++p, to += kSlice) {
          const Piece& piece = plan.piece[block.first_piece + p];
          for (int h = 0; h < 2; ++h) {
            const auto inside =
                static_cast<__mmask16>(first_lanes(piece.last - 16 * h) & ~first_lanes(piece.first - 16 * h));
            const __m512i kept = _mm512_maskz_mov_epi32(inside, integer[2 * piece.slice + h]);
            sum = _mm512_add_epi32(sum, kept);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16 * h), _mm512_cvtepi32_epi16(kept));
          }
        }
        out.sum[s * out.rows + m] = finite ? scale * static_cast<float>(_mm512_reduce_add_epi32(sum)) : NAN;
      }
    }
}

// The words that hold 32 rows' nibbles, and how far these are shifted.
struct SliceWords {
  const uint16_t* words;
  int shift;
};
SliceWords slice_words(const Weight& w, int64_t slice) {
  return {w.words + slice / kSlices * kSlice * w.np, static_cast<int>(slice % kSlices) * 4};
}
// Those of the lower halves of 8-bit values, whose upper ones are in `slice`.
SliceWords low_words(const Weight& w, int64_t slice) { return slice_words(w, w.bits == 8 ? w.k / kSlice + slice : slice); }

__m512i nibbles_of(__m512i words, int shift) {
  return _mm512_and_si512(_mm512_srl_epi32(words, _mm_cvtsi32_si128(shift)), _mm512_set1_epi16(15));
}
// 16 high + low - 128
__m512i bytes_of(__m512i high, int high_shift, __m512i low, int low_shift) {
  const __m512i sixteens = _mm512_slli_epi16(nibbles_of(high, high_shift), 4);
  return _mm512_sub_epi16(_mm512_or_si512(sixteens, nibbles_of(low, low_shift)), _mm512_set1_epi16(128));
}

// Superblock b, columns [begin, begin + columns) -> panel [slice][pair][columns in split order][2 rows].
void unpack_pairs(const Weight& w, int64_t b, int slices, int64_t begin, int columns, int16_t* panel) {
  for (int s = 0; s < slices; ++s) {
    const SliceWords high = slice_words(w, b * kSlices + s), low = low_words(w, b * kSlices + s);
    for (int c = 0; c < columns; c += 32) {
      const int valid = static_cast<int>(std::min<int64_t>(w.np - begin - c, 32));
      const auto load = [&](const SliceWords& slice, int row) {
        return Avx512::load_words(slice.words + row * w.np + begin + c, valid);
      };
      for (int pair = 0; pair < kPairs; ++pair) {
        const __m512i even = load(high, 2 * pair), odd = load(high, 2 * pair + 1);
        __m512i half[2] = {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
        if (w.bits == 8) {
          const __m512i low_even = load(low, 2 * pair), low_odd = load(low, 2 * pair + 1);
          half[0] = bytes_of(half[0], high.shift, _mm512_unpacklo_epi16(low_even, low_odd), low.shift);
          half[1] = bytes_of(half[1], high.shift, _mm512_unpackhi_epi16(low_even, low_odd), low.shift);
        } else {
          for (__m512i& words : half) words = nibbles_of(words, high.shift);
        }
        int16_t* to = panel + ((s * kPairs + pair) * columns + c) * 2;
        _mm512_store_si512(to, half[0]);
        _mm512_store_si512(to + 32, half[1]);
      }
    }
  }
}

// What the tiles of a superblock share: its segments, the panel and the scales [segment][columns] of its columns.
struct PairBlock {
  const Segment* segments;
  int num_segments;
  const Piece* pieces;
  const int16_t* panel;
  int columns;
  const float *scale, *offset;
};

// MR rows of x [rows][pieces][32], NV vectors of columns from `c` on: added to `out` [MR, columns] as floats.
template <int MR, int NV>
void pair_tile(const PairBlock& block, int c, const int16_t* x, int64_t x_stride, const float* x_scale, const float* x_sum,
               int64_t rows, float* out) {
  for (int s = 0; s < block.num_segments; ++s) {
    __m512i sums[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sums[i][v] = _mm512_setzero_si512();
    for (int p = block.segments[s].first_piece; p < block.segments[s].last_piece; ++p) {
      const int16_t* weights = block.panel + (block.pieces[p].slice * kPairs * block.columns + c) * 2;
      const int16_t* from = x + p * kSlice;
#pragma GCC unroll 4
      for (int pair = 0; pair < kPairs; ++pair) {
        __m512i q[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) q[v] = _mm512_load_si512(weights + (pair * block.columns + v * 16) * 2);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          int32_t two;
          std::memcpy(&two, from + i * x_stride + 2 * pair, 4);
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) sums[i][v] = _mm512_dpwssd_epi32(sums[i][v], q[v], _mm512_set1_epi32(two));
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const int at = s * block.columns + c + v * 16;
      const __m512 scale = _mm512_load_ps(block.scale + at), offset = _mm512_load_ps(block.offset + at);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        float* to = out + i * block.columns + c + v * 16;
        const __m512 scaled = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale[i]));
        const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][v]), scaled, _mm512_load_ps(to));
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(x_sum[s * rows + i]), offset, y));
      }
    }
  }
}

// `pair_tile` for rows [first, rows) and all columns; the rows left over go in smaller tiles.
template <int MR>
void pair_tiles(const PairBlock& block, int64_t rows, int64_t first, const int16_t* x, int64_t x_stride,
                const float* x_scale, const float* x_sum, float* out) {
  int64_t m = first;
  for (; m + MR <= rows; m += MR)
    for (int c = 0; c < block.columns; c += 16 * kTileVectors)
      pair_tile<MR, kTileVectors>(block, c, x + m * x_stride, x_stride, x_scale + m, x_sum + m, rows,
                                  out + m * block.columns);
  if constexpr (MR > 1)
    if (m < rows) pair_tiles<(MR > 4 ? 4 : MR / 2)>(block, rows, m, x, x_stride, x_scale, x_sum, out);
}

void forward_pairs(const Plan& plan, const Weight& w, const Quantized& x, int64_t begin, int64_t end, float* y) {
  const int columns = static_cast<int>((end - begin + 31) / 32) * 32;
  alignas(64) int16_t panel[kSuperblock * kMaxPaired];
  Scratch out(x.rows * columns);
  for (int64_t b = 0; b < plan.superblocks; ++b) {
    const Superblock& superblock = plan.superblock[b];
    const int count = superblock.segments;
    Scratch scales(2 * count * columns);
    const PairBlock block{plan.segment + superblock.first_segment, count, plan.piece + superblock.first_piece, panel,
                          columns, scales.data, scales.data + count * columns};
    for (int s = 0; s < count; ++s)
      load_scales<Avx512, true>(w, block.segments[s].group, begin, columns, scales.data + s * columns,
                                scales.data + (count + s) * columns);
    unpack_pairs(w, b, block.pieces[superblock.pieces - 1].slice + 1, begin, columns, panel);
    const int16_t* values = reinterpret_cast<const int16_t*>(x.values) + superblock.first_piece * x.rows * kSlice;
    pair_tiles<kTileRows>(block, x.rows, 0, values, superblock.pieces * kSlice, x.scale + b * x.rows,
                          x.sum + superblock.first_segment * x.rows, out.data);
  }
  write_rows<Avx512>(out.data, x.rows, columns, begin, end, w.n, y);
}

// 16 x 16 lanes of 32 bits, turned in place.
void turn(__m512i* r) {
  __m512i t[16];
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

void prefetch_far(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

// Slice `slice` of W turned: columns [begin, begin + columns) -> panel [pair of columns][32 rows][2]. The 16 pairs of 32
// columns lie in the order that _mm512_packs_epi32 gives those of two vectors.
void unpack_turned(const Weight& w, int64_t slice, int64_t begin, int columns, int16_t* panel) {
  const SliceWords high = slice_words(w, slice), low = low_words(w, slice);
  for (int c = 0; c < columns; c += 32) {
    const int valid = static_cast<int>(std::clamp<int64_t>(w.np - begin - c, 0, 32));
    for (int half = 0; half < kSlice; half += 16) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t at = (half + i) * w.np + begin + c;
        const __m512i words = Avx512::load_words(high.words + at, valid);
        prefetch_far(high.words + at + kPairColumns);  // of the next panel: rows lie too far apart for the CPU to see it
        if (w.bits == 8) prefetch_far(low.words + at + kPairColumns);
        rows[i] = w.bits == 8 ? bytes_of(words, high.shift, Avx512::load_words(low.words + at, valid), low.shift)
                              : nibbles_of(words, high.shift);
      }
      turn(rows);
      for (int pair = 0; pair < 16; ++pair) {
        const int place = pair % 8 / 2 * 4 + pair / 8 * 2 + pair % 2;
        _mm512_store_si512(panel + ((c / 2 + place) * kSlice + half) * 2, rows[pair]);
      }
    }
  }
}

// What the rows of dy share in a block of columns of one superblock: for each slice a panel, scales and offsets.
struct TurnedBlock {
  int slices, count, columns;  // columns: count, filled up to a multiple of 32
  const int16_t* panel;        // [slice][kPairColumns / 2][32][2]
  const float *scale, *offset;  // [slice][kPairColumns]; offset null for none
};

// One slice: z * s of MR rows as integers, and of each row the sum of z * offset.
template <int MR>
void scale_rows(const TurnedBlock& block, int slice, const float* z, int16_t* u, float* sum) {
  const float* scale = block.scale + slice * kPairColumns;
  const float* offset = block.offset ? block.offset + slice * kPairColumns : nullptr;
  for (int i = 0; i < MR; ++i) {
    __m512 total = _mm512_setzero_ps();
    for (int c = 0; c < block.columns; c += 32) {
      __m512i whole[2];
      for (int h = 0; h < 2; ++h) {
        const __m512 v = _mm512_load_ps(z + i * kPairColumns + c + 16 * h);
        whole[h] = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_load_ps(scale + c + 16 * h)));
        if (offset) total = _mm512_fmadd_ps(v, _mm512_load_ps(offset + c + 16 * h), total);
      }
      _mm512_store_si512(u + i * kPairColumns + c, _mm512_packs_epi32(whole[0], whole[1]));
    }
    sum[i] = offset ? _mm512_reduce_add_ps(total) : 0.0f;
  }
}

// out [MR][32 of kSuperblock] += step * (u @ panel + sum).
template <int MR>
void turned_tile(const int16_t* u, const int16_t* panel, int columns, const float* sum, const float* step, float* out) {
  __m512i sums[MR][2];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_si512();
  for (int pair = 0; pair < columns / 2; ++pair) {
    const __m512i first = _mm512_load_si512(panel + pair * kSlice * 2);
    const __m512i last = _mm512_load_si512(panel + pair * kSlice * 2 + 32);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      int32_t two;
      std::memcpy(&two, u + i * kPairColumns + 2 * pair, 4);
      const __m512i both = _mm512_set1_epi32(two);
      sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], both, first);
      sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], both, last);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      float* to = out + i * kSuperblock + 16 * h;
      const __m512 value = _mm512_add_ps(_mm512_cvtepi32_ps(sums[i][h]), _mm512_set1_ps(sum[i]));
      _mm512_store_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(step[i]), _mm512_load_ps(to)));
    }
}

// Rows [first, rows) of dy, `stride` floats apart: all slices, added to out [rows][kSuperblock].
template <int MR>
void turned_rows(const TurnedBlock& block, const float* dy, int64_t stride, int64_t rows, int64_t first, const float* step,
                 int64_t step_stride, float* out) {
  int64_t m = first;
  for (; m + MR <= rows; m += MR) {
    alignas(64) float z[MR * kPairColumns];  // dy over step
    alignas(64) int16_t u[MR * kPairColumns];
    float steps[MR], sum[MR];
    for (int i = 0; i < MR; ++i) {
      steps[i] = step[(m + i) * step_stride];
      const __m512 inverse = _mm512_set1_ps(steps[i] != 0 ? 1.0f / steps[i] : 0.0f);
      const float* row = dy + (m + i) * stride;
      for (int c = 0; c < block.columns; c += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(first_lanes(block.count - c), row + c);
        prefetch_far(row + c + kPairColumns);
        _mm512_store_ps(z + i * kPairColumns + c, _mm512_mul_ps(v, inverse));
      }
    }
    for (int s = 0; s < block.slices; ++s) {
      scale_rows<MR>(block, s, z, u, sum);
      turned_tile<MR>(u, block.panel + s * kPairColumns * kSlice, block.columns, sum, steps,
                      out + m * kSuperblock + s * kSlice);
    }
  }
  if constexpr (MR > 1)
    if (m < rows) turned_rows<MR / 2>(block, dy, stride, rows, m, step, step_stride, out);
}

void largest_scales(const Plan& plan, const Weight& w, float* out) {
  alignas(64) float scale[32], offset[32];
  for (int64_t c = 0; c < w.np; c += 32) {
    std::fill(out + c, out + c + 32, 0.0f);
    for (int64_t s = 0; s < plan.segments; ++s) {
      load_scales<Avx512, false>(w, plan.segment[s].group, c, 32, scale, offset);
      for (int i = 0; i < 32; ++i) out[c + i] = std::max(out[c + i], std::fabs(scale[i]));
    }
  }
}

void backward_steps(const Weight& w, const float* largest, const float* dy, int64_t first, int64_t last, float* step) {
  for (int64_t m = first; m < last; ++m)
    for (int64_t begin = 0; begin < w.n; begin += kPairColumns) {
      uint32_t most = 0;  // the bits of a positive float grow with it, NaN last
      const int64_t end = std::min<int64_t>(w.n, begin + kPairColumns);
      for (int64_t c = begin; c < end; ++c) {
        const float scaled = std::fabs(dy[m * w.n + c] * largest[c]);
        uint32_t bits;
        std::memcpy(&bits, &scaled, 4);
        most = std::max(most, bits);
      }
      float biggest;
      std::memcpy(&biggest, &most, 4);
      const bool finite = most < 0x7f800000u;
      step[m * ((w.n + kPairColumns - 1) / kPairColumns) + begin / kPairColumns] =
          finite ? (biggest > 1e-30f ? biggest / 32767.0f : 0.0f) : NAN;
    }
}

void backward_pairs(const Weight& w, const float* dy, const float* step, int64_t rows, int64_t b, float* dx) {
  const int kept = static_cast<int>(std::min<int64_t>(kSuperblock, w.k - b * kSuperblock));
  Scratch out(rows * kSuperblock), scales(2 * kSlices * kPairColumns);
  alignas(64) int16_t panel[kSuperblock * kPairColumns];
  float* offsets = scales.data + kSlices * kPairColumns;
  const int64_t blocks = (w.n + kPairColumns - 1) / kPairColumns;
  TurnedBlock block{(kept + kSlice - 1) / kSlice, 0, 0, panel, scales.data, w.bits == 8 ? nullptr : offsets};
  for (int64_t begin = 0; begin < w.n; begin += kPairColumns) {
    block.count = static_cast<int>(std::min<int64_t>(kPairColumns, w.n - begin));
    block.columns = (block.count + 31) / 32 * 32;
    for (int s = 0; s < block.slices; ++s) {
      load_scales<Avx512, false>(w, (b * kSuperblock + s * kSlice) / w.group_size, begin, block.columns,
                                 scales.data + s * kPairColumns, offsets + s * kPairColumns);
      unpack_turned(w, b * kSlices + s, begin, block.columns, panel + s * kPairColumns * kSlice);
    }
    turned_rows<kTurnedRows>(block, dy + begin, w.n, rows, 0, step + begin / kPairColumns, blocks, out.data);
  }
  for (int64_t m = 0; m < rows; ++m)
    std::memcpy(dx + m * w.k + b * kSuperblock, out.data + m * kSuperblock, kept * sizeof(float));
}
