// x86-64 with AMX (bfloat16): Intel from Sapphire Rapids on. Many rows only; few rows are avx512.cc's.
//
// A float is hi + lo, two bfloat16 of 8 bits each, so a product is hi*hi + hi*lo + lo*hi with a relative error of about
// 2^-16, summed in fp32: as good as 16-bit integers, without a conversion per group, which with groups of 32 would take
// longer than the products. Weights are dequantized and split a tile of 128 x 128 at a time, in the second-level cache.
#include "plan.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace w4a16 {
namespace {

#include "avx512.h"
#include "quantize.h"

constexpr int kTile = 16;                        // rows of a tile, and floats of a row of the result's tiles
constexpr int kStep = 32;                        // depth of one product of tiles
constexpr int kPlane = kTile * kStep;            // elements of one tile of one plane
constexpr int kDepth = kSuperblock;              // rows of the second operand that are unpacked together
constexpr int kSteps = kDepth / kStep;

int64_t steps(int64_t depth) { return (depth + kStep - 1) / kStep; }
int64_t row_tiles(int64_t rows) { return (rows + 2 * kTile - 1) / (2 * kTile) * 2; }

int64_t plane_bytes(int64_t rows, int64_t depth) { return row_tiles(rows) * steps(depth) * 2 * kPlane * 2; }

// Two vectors of floats -> 32 bfloat16 each of hi and lo, first a's, then b's.
struct Planes {
  __m512i hi, lo;
};
Planes split_floats(__m512 a, __m512 b) {
  const __m512i hi = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
  const auto widen = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  const __m512 lo_a = _mm512_sub_ps(a, widen(_mm512_castsi512_si256(hi)));
  const __m512 lo_b = _mm512_sub_ps(b, widen(_mm512_extracti64x4_epi64(hi, 1)));
  return {hi, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(lo_b, lo_a))};
}

// `count` of at most 32 floats, the rest zero, as two vectors.
void load_masked(const float* from, int64_t count, __m512* low, __m512* high) {
  const uint32_t mask = count >= kStep ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
  *low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
  *high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + kTile);
}

// planes [row tile][step][hi, lo][16 rows][32]; rows and depth beyond x are zero.
void split(const float* x, int64_t stride, int64_t rows, int64_t depth, int64_t first, int64_t last, uint16_t* planes) {
  for (int64_t tile = first; tile < last; ++tile)
    for (int64_t step = 0; step < steps(depth); ++step) {
      uint16_t* to = planes + (tile * steps(depth) + step) * 2 * kPlane;
      for (int i = 0; i < kTile; ++i, to += kStep) {
        const int64_t row = tile * kTile + i;
        __m512 low, high;
        load_masked(x + row * stride + step * kStep, row < rows ? depth - step * kStep : 0, &low, &high);
        const Planes both = split_floats(low, high);
        _mm512_store_si512(to, both.hi);
        _mm512_store_si512(to + kPlane, both.lo);
      }
    }
}

// Two rows of the second operand (16 columns each) -> one row of the tiles that products read it from:
// [step][column tile][hi, lo][16 pairs of rows][16 columns][2]. hi is rounded to nearest, lo towards zero.
void store_pair(__m512 even, __m512 odd, int column_tiles, int pair, int column_tile, uint16_t* tiles) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const auto round = [&](__m512 v) { return _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(v), half), upper); };
  const auto rest = [](__m512 v, __m512i hi) {
    return _mm512_castps_si512(_mm512_sub_ps(v, _mm512_castsi512_ps(hi)));
  };
  const __m512i hi_even = round(even), hi_odd = round(odd), lo_even = rest(even, hi_even), lo_odd = rest(odd, hi_odd);
  uint16_t* to = tiles + (pair / kTile * column_tiles + column_tile) * 2 * kPlane + pair % kTile * kStep;
  _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32(hi_even, 16), hi_odd));
  _mm512_store_si512(to + kPlane,  // upper ? odd : even
                     _mm512_ternarylogic_epi32(upper, lo_odd, _mm512_srli_epi32(lo_even, 16), 0xCA));
}

// The nibbles at bit `shift` of 16 words, as floats: a permutation takes the lowest four bits of its indices.
__m512 nibbles(__m512i words, int shift) {
  const __m512 floats = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), floats);
}

// Scales and offsets of the groups of one superblock, for up to kMatrixColumns columns.
struct Scales {
  alignas(64) float scale[kMatrixSegments][kMatrixColumns], offset[kMatrixSegments][kMatrixColumns];
  alignas(64) int32_t segment[kSuperblock] = {};  // of each row; 0 beyond K, where the other operand is zero
  int segments;

  Scales(const Plan& plan, const Weight& w, int64_t b, int64_t begin, int columns) {
    const Superblock& block = plan.superblock[b];
    segments = block.segments;
    for (int s = 0; s < segments; ++s) {
      const Segment& one = plan.segment[block.first_segment + s];
      load_scales<Avx512, false>(w, one.group, begin, columns, scale[s], offset[s]);
      for (int p = one.first_piece; p < one.last_piece; ++p) {
        const Piece& piece = plan.piece[block.first_piece + p];
        std::fill(segment + piece.slice * kSlice + piece.first, segment + piece.slice * kSlice + piece.last, s);
      }
    }
  }
};

// Superblock b, columns [begin, begin + columns), as 128 rows of the second operand. columns is a multiple of 32.
void dequantize_rows(const Plan& plan, const Weight& w, int64_t b, int64_t begin, int columns, uint16_t* tiles) {
  const Scales scales(plan, w, b, begin, columns);
  for (int r = 0; r < kSlice; r += 2)
    for (int c = 0; c < columns; c += kTile) {
      __m512i words[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int i = 0; begin + c < w.np && i < 2; ++i)
        words[i] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(w.words + (b * kSlice + r + i) * w.np + begin + c)));
      for (int slice = 0; slice < kSlices; ++slice) {
        __m512 row[2];
        for (int i = 0; i < 2; ++i) {
          const int s = scales.segment[slice * kSlice + r + i];
          row[i] = Avx512::fma(nibbles(words[i], 4 * slice), Avx512::load_f(scales.scale[s] + c),
                               Avx512::load_f(scales.offset[s] + c));
        }
        store_pair(row[0], row[1], columns / kTile, (slice * kSlice + r) / 2, c / kTile, tiles);
      }
    }
}

// Superblock b transposed: columns [begin, begin + count) of W as rows of the second operand, a multiple of 32 of them.
void dequantize_columns(const Plan& plan, const Weight& w, int64_t b, int64_t begin, int count, uint16_t* tiles) {
  const int rows = (count + kStep - 1) / kStep * kStep;
  const Scales scales(plan, w, b, begin, rows);
  alignas(64) float scale[kMatrixColumns][kTile] = {}, offset[kMatrixColumns][kTile] = {};  // a column's segments in a vector
  for (int s = 0; s < scales.segments; ++s)
    for (int c = 0; c < rows; ++c) {
      scale[c][s] = scales.scale[s][c];
      offset[c][s] = scales.offset[s][c];
    }
  const __m512i row_offsets = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(w.np / 2));
  for (int c = 0; c < rows; c += 2)
    for (int r = 0; r < kSlice; r += kTile) {
      __m512i words = _mm512_setzero_si512();  // of two columns in each lane, a lane for each of 16 rows
      if (begin + c < w.np) words = _mm512_i32gather_epi32(row_offsets, w.words + (b * kSlice + r) * w.np + begin + c, 4);
      for (int slice = 0; slice < kSlices; ++slice) {
        const __m512i segment = _mm512_load_si512(scales.segment + slice * kSlice + r);
        __m512 row[2];
        for (int i = 0; i < 2; ++i)
          row[i] = Avx512::fma(nibbles(words, 16 * i + 4 * slice),
                               _mm512_permutexvar_ps(segment, Avx512::load_f(scale[c + i])),
                               _mm512_permutexvar_ps(segment, Avx512::load_f(offset[c + i])));
        store_pair(row[0], row[1], kSuperblock / kTile, c / 2, (slice * kSlice + r) / kTile, tiles);
      }
    }
}

// 16 x 16 words of 32 bits, turned.
void transpose(__m512i* row) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {  // row[i + 2j], [i + 2j + 1]: column 2j, 2j + 1 of each 128 bits of four rows
      row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    row[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    row[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Rows [first, first + 128) and columns [begin, begin + columns) of floats [depth, width] as the second operand.
void split_rows(const float* w, int64_t depth, int64_t width, int64_t first, int64_t begin, int columns, uint16_t* tiles) {
  for (int r = 0; r < kDepth; r += 2)
    for (int c = 0; c < columns; c += kStep) {
      __m512 row[2][2];
      for (int i = 0; i < 2; ++i)
        load_masked(w + (first + r + i) * width + begin + c, first + r + i < depth ? width - begin - c : 0, &row[i][0],
                    &row[i][1]);
      for (int half = 0; half < 2; ++half)
        store_pair(row[0][half], row[1][half], columns / kTile, r / 2, c / kTile + half, tiles);
    }
}

// The same of floats [width, depth] turned.
void split_turned(const float* w, int64_t depth, int64_t width, int64_t first, int64_t begin, int columns,
                  uint16_t* tiles) {
  for (int c = 0; c < columns; c += kTile)
    for (int r = 0; r < kDepth; r += kStep) {
      __m512i low[kTile], high[kTile];  // a row of W each, 32 of the depth
      for (int i = 0; i < kTile; ++i) {
        const int64_t row = begin + c + i;
        __m512 halves[2];
        load_masked(w + row * depth + first + r, row < width ? depth - first - r : 0, &halves[0], &halves[1]);
        low[i] = _mm512_castps_si512(halves[0]);
        high[i] = _mm512_castps_si512(halves[1]);
      }
      transpose(low);
      transpose(high);
      for (int i = 0; i < kStep; i += 2) {
        const __m512i* row = i < kTile ? low + i : high + i - kTile;
        store_pair(_mm512_castsi512_ps(row[0]), _mm512_castsi512_ps(row[1]), columns / kTile, (r + i) / 2, c / kTile, tiles);
      }
    }
}

// Configures the matrix unit's registers while it lives. What this thread had is put back: other libraries may configure
// a thread once.
struct TileRegisters {
  struct alignas(64) Config {
    uint8_t palette = 0, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } before;
  TileRegisters() {
    _tile_storeconfig(&before);
    Config config;
    config.palette = 1;
    std::fill(config.bytes, config.bytes + 8, kStep * sizeof(uint16_t));
    std::fill(config.rows, config.rows + 8, kTile);
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_loadconfig(&before); }
  TileRegisters(const TileRegisters&) = delete;
};

// The tiles of sums of 32 rows and columns in `out`, whose rows are `stride` floats apart.
void load_sums(const float* out, int64_t stride) {
  _tile_loadd(0, out, stride * 4);
  _tile_loadd(1, out + kTile, stride * 4);
  _tile_loadd(2, out + kTile * stride, stride * 4);
  _tile_loadd(3, out + kTile * stride + kTile, stride * 4);
}
void store_sums(float* out, int64_t stride) {
  _tile_stored(0, out, stride * 4);
  _tile_stored(1, out + kTile, stride * 4);
  _tile_stored(2, out + kTile * stride, stride * 4);
  _tile_stored(3, out + kTile * stride + kTile, stride * 4);
}

// Sums += `count` steps of two row tiles (a0, a1) @ two column tiles (b, b + 2 planes; `b_step` elements a step): hi*lo,
// hi*hi, lo*hi, so that a plane is loaded once.
void multiply_steps(const uint16_t* a0, const uint16_t* a1, const uint16_t* b, int64_t b_step, int count) {
  for (int s = 0; s < count; ++s, a0 += 2 * kPlane, a1 += 2 * kPlane, b += b_step) {
    _tile_loadd(4, a0, 64);
    _tile_loadd(5, a1, 64);
    _tile_loadd(6, b + kPlane, 64);
    _tile_loadd(7, b + 3 * kPlane, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 2 * kPlane, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a0 + kPlane, 64);
    _tile_loadd(5, a1 + kPlane, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// out [rows, columns] (rows `stride` floats apart) = or += planes, their steps [from, from + count) of `of`, @ tiles.
void multiply_tiles(const uint16_t* planes, int64_t of, int64_t from, int count, int64_t rows, const uint16_t* tiles,
                    int column_tiles, int columns, bool add, float* out, int64_t stride) {
  alignas(64) float corner[4 * kTile * kTile];  // where fewer than 32 rows or columns are left
  for (int64_t m = 0; m < rows; m += 2 * kTile)
    for (int c = 0; c < columns; c += 2 * kTile) {
      const int height = static_cast<int>(std::min<int64_t>(2 * kTile, rows - m)), width = std::min(2 * kTile, columns - c);
      const bool whole = height == 2 * kTile && width == 2 * kTile;
      float* sums = whole ? out + m * stride + c : corner;
      const int64_t sums_stride = whole ? stride : 2 * kTile;
      if (!add) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else {
        for (int i = 0; !whole && i < height; ++i)
          std::memcpy(corner + i * 2 * kTile, out + (m + i) * stride + c, width * sizeof(float));
        load_sums(sums, sums_stride);
      }
      const uint16_t* a = planes + (m / kTile * of + from) * 2 * kPlane;
      multiply_steps(a, a + of * 2 * kPlane, tiles + c / kTile * 2 * kPlane, column_tiles * 2 * kPlane, count);
      store_sums(sums, sums_stride);
      for (int i = 0; !whole && i < height; ++i)
        std::memcpy(out + (m + i) * stride + c, corner + i * 2 * kTile, width * sizeof(float));
    }
}

// Memory for tiles of the second operand: half a megabyte stays in the second-level cache. A thread keeps its own, since
// new pages cost more than the products of a small task.
struct Tiles {
  static constexpr int64_t kElements = 256 * 1024;
  Tiles() : data(static_cast<uint16_t*>(std::aligned_alloc(64, kElements * sizeof(uint16_t)))) {}
  ~Tiles() { std::free(data); }
  Tiles(const Tiles&) = delete;
  // Blocks of kDepth rows that fit in, and the elements of one.
  static int64_t blocks(int column_tiles) { return kElements / block(column_tiles); }
  static int64_t block(int column_tiles) { return int64_t{kSteps} * column_tiles * 2 * kPlane; }
  uint16_t* data;
};
thread_local const Tiles tiles;

void forward_amx(const Plan& plan, const Weight& w, const uint16_t* planes, int64_t rows, int64_t begin, int64_t end,
                 float* y) {
  const int columns = static_cast<int>((end - begin + 31) / 32 * 32), column_tiles = columns / kTile;
  const int64_t all = steps(w.k), at_once = Tiles::blocks(column_tiles);
  const TileRegisters registers;
  for (int64_t first = 0; first < plan.superblocks; first += at_once) {
    const int64_t last = std::min(plan.superblocks, first + at_once);
    for (int64_t b = first; b < last; ++b)
      dequantize_rows(plan, w, b, begin, columns, tiles.data + (b - first) * Tiles::block(column_tiles));
    const int count = static_cast<int>(std::min(all, last * kSteps) - first * kSteps);
    multiply_tiles(planes, all, first * kSteps, count, rows, tiles.data, column_tiles, static_cast<int>(end - begin),
                   first > 0, y + begin, w.n);
  }
}

void backward_amx(const Plan& plan, const Weight& w, const uint16_t* planes, int64_t rows, int64_t b, float* dx) {
  constexpr int kColumnTiles = kSuperblock / kTile;
  const int kept = static_cast<int>(std::min<int64_t>(kSuperblock, w.k - b * kSuperblock));
  const int64_t all = steps(w.n), at_once = Tiles::blocks(kColumnTiles) * kDepth;
  const TileRegisters registers;
  for (int64_t first = 0; first < w.n; first += at_once) {
    const int64_t last = std::min(w.n, first + at_once);
    for (int64_t begin = first; begin < last; begin += kDepth)
      dequantize_columns(plan, w, b, begin, static_cast<int>(std::min<int64_t>(kDepth, last - begin)),
                         tiles.data + (begin - first) / kDepth * Tiles::block(kColumnTiles));
    multiply_tiles(planes, all, first / kStep, static_cast<int>(steps(last - first)), rows, tiles.data, kColumnTiles, kept,
                   first > 0, dx + b * kSuperblock, w.k);
  }
}

void float_amx(const float* w, int64_t depth, int64_t width, bool turned, const uint16_t* planes, int64_t rows,
               int64_t from, int64_t to, int64_t begin, int64_t end, float* y) {
  const int columns = static_cast<int>((end - begin + 31) / 32 * 32), column_tiles = columns / kTile;
  const int64_t at_once = Tiles::blocks(column_tiles) * kDepth;
  const TileRegisters registers;
  for (int64_t first = from; first < to; first += at_once) {
    const int64_t last = std::min(to, first + at_once);
    for (int64_t at = first; at < last; at += kDepth)
      (turned ? split_turned : split_rows)(w, depth, width, at, begin, columns,
                                           tiles.data + (at - first) / kDepth * Tiles::block(column_tiles));
    multiply_tiles(planes, steps(to - from), (first - from) / kStep, static_cast<int>(steps(last - first)), rows, tiles.data,
                   column_tiles, static_cast<int>(end - begin), first > 0, y + begin, width);
  }
}

const MatrixKernels kernels = {row_tiles, plane_bytes, split, forward_amx, backward_amx, float_amx};

}  // namespace

const MatrixKernels* const kAmx = &kernels;

}  // namespace w4a16

#else

namespace w4a16 {
const MatrixKernels* const kAmx = nullptr;
}

#endif
