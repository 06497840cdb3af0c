// Products of many rows by dot products of pairs of 16-bit integers (x86-64), both ways, W in 4 or 8 bits.
//
// Forward is forward.h's arithmetic, operation by operation, but 16-bit x needs no planes here. Backward the sum runs
// over columns, whose scales differ, so dy * s becomes integers, once for each slice of rows: 16 bits with one step for a
// row of dy and kPairColumns columns. A gradient so has a relative error of 2e-4. Included like forward.h, after it.

constexpr int kPairs = kSlice / 2;
constexpr int kTileRows = 6;     // of a tile, forward: 12 sums
constexpr int kTileVectors = 2;  // both ways

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

// 16 high + low - 128
template <class Simd>
typename Simd::Words bytes_of(typename Simd::Words high, int high_shift, typename Simd::Words low, int low_shift) {
  return Simd::join_nibbles(Simd::nibbles_of(high, high_shift), Simd::nibbles_of(low, low_shift));
}

// Superblock b, columns [begin, begin + columns) -> panel [slice][pair][columns in split order][2 rows].
template <class Simd>
void unpack_pairs(const Weight& w, int64_t b, int slices, int64_t begin, int columns, int16_t* panel) {
  constexpr int kWide = 2 * Simd::kLanes;
  for (int s = 0; s < slices; ++s) {
    const SliceWords high = slice_words(w, b * kSlices + s), low = low_words(w, b * kSlices + s);
    for (int c = 0; c < columns; c += kWide) {
      const int valid = static_cast<int>(std::min<int64_t>(w.np - begin - c, kWide));
      const auto load = [&](const SliceWords& slice, int row) {
        return Simd::load_words(slice.words + row * w.np + begin + c, valid);
      };
      for (int pair = 0; pair < kPairs; ++pair) {
        const typename Simd::Words even = load(high, 2 * pair), odd = load(high, 2 * pair + 1);
        typename Simd::Words half[2] = {Simd::template interleave<0>(even, odd), Simd::template interleave<1>(even, odd)};
        if (w.bits == 8) {
          const typename Simd::Words low_even = load(low, 2 * pair), low_odd = load(low, 2 * pair + 1);
          half[0] = bytes_of<Simd>(half[0], high.shift, Simd::template interleave<0>(low_even, low_odd), low.shift);
          half[1] = bytes_of<Simd>(half[1], high.shift, Simd::template interleave<1>(low_even, low_odd), low.shift);
        } else {
          for (typename Simd::Words& words : half) words = Simd::nibbles_of(words, high.shift);
        }
        int16_t* to = panel + ((s * kPairs + pair) * columns + c) * 2;
        Simd::store_words(to, half[0]);
        Simd::store_words(to + kWide, half[1]);
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

// MR rows of x [rows][pieces][32], kTileVectors of columns from `c` on: added to `out` [MR, columns] as floats.
template <class Simd, int MR>
void pair_tile(const PairBlock& block, int c, const int16_t* x, int64_t x_stride, const float* x_scale, const float* x_sum,
               int64_t rows, float* out) {
  for (int s = 0; s < block.num_segments; ++s) {
    typename Simd::Words sums[MR][kTileVectors];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] = Simd::zero_words();
    for (int p = block.segments[s].first_piece; p < block.segments[s].last_piece; ++p) {
      const int16_t* weights = block.panel + (block.pieces[p].slice * kPairs * block.columns + c) * 2;
      const int16_t* from = x + p * kSlice;
#pragma GCC unroll 4
      for (int pair = 0; pair < kPairs; ++pair) {
        typename Simd::Words q[kTileVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) q[v] = Simd::load_bytes(weights + (pair * block.columns + v * Simd::kLanes) * 2);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          const typename Simd::Words two = Simd::broadcast4(from + i * x_stride + 2 * pair);
#pragma GCC unroll 2
          for (int v = 0; v < kTileVectors; ++v) sums[i][v] = Simd::add_pairs(sums[i][v], q[v], two);
        }
      }
    }
    asm volatile("" ::: "memory");  // or compilers keep x_scale in registers that the sums need
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      const int at = s * block.columns + c + v * Simd::kLanes;
      const typename Simd::F scale = Simd::load_f(block.scale + at), offset = Simd::load_f(block.offset + at);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        float* to = out + i * block.columns + c + v * Simd::kLanes;
        const typename Simd::F scaled = Simd::mul(scale, Simd::broadcast(x_scale[i]));
        const typename Simd::F y = Simd::fma(Simd::to_float(sums[i][v]), scaled, Simd::load_f(to));
        Simd::store_f(to, Simd::fma(Simd::broadcast(x_sum[s * rows + i]), offset, y));
      }
    }
  }
}

// `pair_tile` for rows [first, rows) and all columns; the rows left over go in smaller tiles.
template <class Simd, int MR>
void pair_tiles(const PairBlock& block, int64_t rows, int64_t first, const int16_t* x, int64_t x_stride,
                const float* x_scale, const float* x_sum, float* out) {
  int64_t m = first;
  for (; m + MR <= rows; m += MR)
    for (int c = 0; c < block.columns; c += kTileVectors * Simd::kLanes)
      pair_tile<Simd, MR>(block, c, x + m * x_stride, x_stride, x_scale + m, x_sum + m, rows, out + m * block.columns);
  if constexpr (MR > 1)
    if (m < rows) pair_tiles<Simd, fewer_rows(MR)>(block, rows, m, x, x_stride, x_scale, x_sum, out);
}

template <class Simd>
void forward_pairs(const Plan& plan, const Weight& w, const Quantized& x, int64_t begin, int64_t end, float* y) {
  constexpr int kWide = 2 * Simd::kLanes;
  const int columns = static_cast<int>((end - begin + kWide - 1) / kWide) * kWide;
  alignas(64) int16_t panel[kSuperblock * kMaxPaired];
  Scratch out(x.rows * columns);
  for (int64_t b = 0; b < plan.superblocks; ++b) {
    const Superblock& superblock = plan.superblock[b];
    const int count = superblock.segments;
    Scratch scales(2 * count * columns);
    const PairBlock block{plan.segment + superblock.first_segment, count, plan.piece + superblock.first_piece, panel,
                          columns, scales.data, scales.data + count * columns};
    for (int s = 0; s < count; ++s)
      load_scales<Simd, true>(w, block.segments[s].group, begin, columns, scales.data + s * columns,
                              scales.data + (count + s) * columns);
    unpack_pairs<Simd>(w, b, block.pieces[superblock.pieces - 1].slice + 1, begin, columns, panel);
    const int16_t* values = reinterpret_cast<const int16_t*>(x.values) + superblock.first_piece * x.rows * kSlice;
    pair_tiles<Simd, kTileRows>(block, x.rows, 0, values, superblock.pieces * kSlice, x.scale + b * x.rows,
                        x.sum + superblock.first_segment * x.rows, out.data);
  }
  write_rows<Simd>(out.data, x.rows, columns, begin, end, w.n, y);
}

void prefetch_far(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

// Slice `slice` of W turned: columns [begin, begin + columns) -> panel [pair of columns][32 rows][2]. The pairs of the
// columns of two vectors lie in the order that `pack` gives those.
template <class Simd>
void unpack_turned(const Weight& w, int64_t slice, int64_t begin, int columns, int16_t* panel) {
  constexpr int kLanes = Simd::kLanes;
  const SliceWords high = slice_words(w, slice), low = low_words(w, slice);
  for (int c = 0; c < columns; c += 2 * kLanes) {
    const int valid = static_cast<int>(std::clamp<int64_t>(w.np - begin - c, 0, 2 * kLanes));
    for (int first = 0; first < kSlice; first += kLanes) {
      typename Simd::Words rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t at = (first + i) * w.np + begin + c;
        const typename Simd::Words words = Simd::load_words(high.words + at, valid);
        prefetch_far(high.words + at + kPairColumns);  // of the next panel: rows lie too far apart for the CPU to see it
        if (w.bits == 8) prefetch_far(low.words + at + kPairColumns);
        rows[i] = w.bits == 8 ? bytes_of<Simd>(words, high.shift, Simd::load_words(low.words + at, valid), low.shift)
                              : Simd::nibbles_of(words, high.shift);
      }
      Simd::turn(rows);
      for (int pair = 0; pair < kLanes; ++pair) {
        const int place = pair % (kLanes / 2) / 2 * 4 + pair / (kLanes / 2) * 2 + pair % 2;
        Simd::store_words(panel + ((c / 2 + place) * kSlice + first) * 2, rows[pair]);
      }
    }
  }
}

// What the rows of dy share in a block of columns of one superblock: for each slice a panel, scales and offsets.
struct TurnedBlock {
  int slices, count, columns;  // columns: count, filled up to two whole vectors
  const int16_t* panel;        // [slice][kPairColumns / 2][32][2]
  const float *scale, *offset;  // [slice][kPairColumns]; offset null for none
};

// One slice: z * s of MR rows as integers, and of each row the sum of z * offset.
template <class Simd, int MR>
void scale_rows(const TurnedBlock& block, int slice, const float* z, int16_t* u, float* sum) {
  const float* scale = block.scale + slice * kPairColumns;
  const float* offset = block.offset ? block.offset + slice * kPairColumns : nullptr;
  for (int i = 0; i < MR; ++i) {
    typename Simd::F total = Simd::zero_f();
    for (int c = 0; c < block.columns; c += 2 * Simd::kLanes) {
      typename Simd::Words whole[2];
      for (int h = 0; h < 2; ++h) {
        const int at = c + h * Simd::kLanes;
        const typename Simd::F v = Simd::load_f(z + i * kPairColumns + at);
        whole[h] = Simd::to_nearest(Simd::mul(v, Simd::load_f(scale + at)));
        if (offset) total = Simd::fma(v, Simd::load_f(offset + at), total);
      }
      Simd::store_words(u + i * kPairColumns + c, Simd::pack(whole[0], whole[1]));
    }
    sum[i] = offset ? Simd::sum_of(total) : 0.0f;
  }
}

// out [MR] of kSuperblock rows, kTileVectors of them: += step * (u @ panel + sum).
template <class Simd, int MR>
void turned_tile(const int16_t* u, const int16_t* panel, int columns, const float* sum, const float* step, float* out) {
  typename Simd::Words sums[MR][kTileVectors];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sums[i][v] = Simd::zero_words();
  for (int pair = 0; pair < columns / 2; ++pair) {
    typename Simd::Words q[kTileVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) q[v] = Simd::load_bytes(panel + (pair * kSlice + v * Simd::kLanes) * 2);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename Simd::Words two = Simd::broadcast4(u + i * kPairColumns + 2 * pair);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] = Simd::add_pairs(sums[i][v], two, q[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = out + i * kSuperblock + v * Simd::kLanes;
      const typename Simd::F value = Simd::add(Simd::to_float(sums[i][v]), Simd::broadcast(sum[i]));
      Simd::store_f(to, Simd::fma(value, Simd::broadcast(step[i]), Simd::load_f(to)));
    }
}

// Rows [first, rows) of dy, `stride` floats apart: all slices, added to out [rows][kSuperblock].
template <class Simd, int MR>
void turned_rows(const TurnedBlock& block, const float* dy, int64_t stride, int64_t rows, int64_t first, const float* step,
                 int64_t step_stride, float* out) {
  int64_t m = first;
  for (; m + MR <= rows; m += MR) {
    alignas(64) float z[MR * kPairColumns];  // dy over step
    alignas(64) int16_t u[MR * kPairColumns];
    float steps[MR], sum[MR];
    for (int i = 0; i < MR; ++i) {
      steps[i] = step[(m + i) * step_stride];
      const typename Simd::F inverse = Simd::broadcast(steps[i] != 0 ? 1.0f / steps[i] : 0.0f);
      const float* row = dy + (m + i) * stride;
      for (int c = 0; c < block.columns; c += Simd::kLanes) {
        prefetch_far(row + c + kPairColumns);
        Simd::store_f(z + i * kPairColumns + c, Simd::mul(Simd::load_first(row + c, block.count - c), inverse));
      }
    }
    for (int s = 0; s < block.slices; ++s) {
      scale_rows<Simd, MR>(block, s, z, u, sum);
      for (int r = 0; r < kSlice; r += kTileVectors * Simd::kLanes)
        turned_tile<Simd, MR>(u, block.panel + s * kPairColumns * kSlice + 2 * r, block.columns, sum, steps,
                              out + m * kSuperblock + s * kSlice + r);
    }
  }
  if constexpr (MR > 1)
    if (m < rows) turned_rows<Simd, fewer_rows(MR)>(block, dy, stride, rows, m, step, step_stride, out);
}

template <class Simd>
void largest_scales(const Plan& plan, const Weight& w, float* out) {
  alignas(64) float scale[32], offset[32];
  for (int64_t c = 0; c < w.np; c += 32) {
    std::fill(out + c, out + c + 32, 0.0f);
    for (int64_t s = 0; s < plan.segments; ++s) {
      load_scales<Simd, false>(w, plan.segment[s].group, c, 32, scale, offset);
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

template <class Simd>
void backward_pairs(const Weight& w, const float* dy, const float* step, int64_t rows, int64_t b, float* dx) {
  constexpr int kWide = 2 * Simd::kLanes;
  const int kept = static_cast<int>(std::min<int64_t>(kSuperblock, w.k - b * kSuperblock));
  Scratch out(rows * kSuperblock), scales(2 * kSlices * kPairColumns);
  alignas(64) int16_t panel[kSuperblock * kPairColumns];
  float* offsets = scales.data + kSlices * kPairColumns;
  const int64_t blocks = (w.n + kPairColumns - 1) / kPairColumns;
  TurnedBlock block{(kept + kSlice - 1) / kSlice, 0, 0, panel, scales.data, w.bits == 8 ? nullptr : offsets};
  for (int64_t begin = 0; begin < w.n; begin += kPairColumns) {
    block.count = static_cast<int>(std::min<int64_t>(kPairColumns, w.n - begin));
    block.columns = (block.count + kWide - 1) / kWide * kWide;
    for (int s = 0; s < block.slices; ++s) {
      load_scales<Simd, false>(w, (b * kSuperblock + s * kSlice) / w.group_size, begin, block.columns,
                               scales.data + s * kPairColumns, offsets + s * kPairColumns);
      unpack_turned<Simd>(w, b * kSlices + s, begin, block.columns, panel + s * kPairColumns * kSlice);
    }
    turned_rows<Simd, Simd::kTurnedRows>(block, dy + begin, w.n, rows, 0, step + begin / kPairColumns, blocks, out.data);
  }
  for (int64_t m = 0; m < rows; ++m)
    std::memcpy(dx + m * w.k + b * kSuperblock, out.data + m * kSuperblock, kept * sizeof(float));
}

template <class Simd>
constexpr PairKernels kPairKernels = {quantize<int16_t>, forward_pairs<Simd>, largest_scales<Simd>, backward_steps,
                                      backward_pairs<Simd>};
