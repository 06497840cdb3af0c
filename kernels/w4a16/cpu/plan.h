// What one product is, and how K is cut into pieces that the kernels can take whole. Plain data, no instructions of any
// particular CPU: every translation unit includes it. kernels/w4a16/layout.py describes the packed arrays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace w4a16 {

constexpr int kSuperblock = 128;  // rows of K whose nibbles share words
constexpr int kSlices = 4;        // nibbles of a 16-bit word
constexpr int kSlice = 32;        // rows of K in a slice
constexpr int kQuads = kSlice / 4;
constexpr int kMaxRows = 512;     // rows of x that are quantized and multiplied together
constexpr int kMaxColumns = 1024;  // columns of a task with one row, which works from memory
constexpr int kMaxTiled = 256;     // with more rows, which works from unpacked tiles
constexpr int kMaxPaired = 128;      // with many rows, which works from unpacked pairs of 16-bit integers
constexpr int kPairColumns = 256;    // whose sums of pairs stay in 32 bits: 256 * 32767 * 128 < 2^31
constexpr int kMatrixColumns = 128;  // columns of W that MatrixKernels unpack together
constexpr int kFloatColumns = 320;   // columns of a task whose W is in floats
constexpr int64_t kFloatDepth = 4096;  // depth whose planes are made together, a multiple of kSuperblock
constexpr int kMatrixSegments = 16;  // segments of a superblock that they can take
constexpr int64_t kMatrixGroup = 16;  // so groups must have as many rows

enum class Float : int { kF32, kF16, kBF16 };

// Packed weight [k, n]: W = (q - z) * s, or q * s + m where `minimum` is not null (then `zero` is).
struct Weight {
  int64_t k, n, kp, np, group_size;
  const uint16_t* words;  // [kp / 4, np]
  const void* scale;      // [groups, np] of scale_type
  Float scale_type;
  const uint8_t* zero;    // [ceil(groups / 2), np], two nibbles
  const void* minimum;    // [groups, np] of minimum_type
  Float minimum_type;
  int bits = 4;           // or 8: the rows of `words` are 2 k, W = (16 high + low - 128) * s, high above low
};

// 32 rows of one slice, or the part of them that lies in one group: x is zero outside [first, last).
struct Piece {
  int slice, first, last;
};

// Consecutive pieces of one superblock that share a group: their integer sums are added before they become floats.
struct Segment {
  int first_piece, last_piece;  // in the superblock
  int64_t group;
};

struct Superblock {
  int64_t first_piece, first_segment;  // in the whole of K
  int pieces, segments;
};

// How K falls into superblocks, groups and slices.
struct Plan {
  int64_t superblocks, pieces, segments;
  const Superblock* superblock;
  const Piece* piece;
  const Segment* segment;
};

// x as integers. A row has one scale per superblock: x = scale * (256 * hi + lo), or scale * lo with one plane.
struct Quantized {
  int64_t rows;
  int planes;
  int8_t* values;  // per superblock [rows, pieces, planes, 32], planes hi then lo; PairKernels: int16 [rows, pieces, 32]
  float* scale;    // [superblocks, rows]
  float* sum;      // [segments, rows]: the sum of the segment's x, as quantized
};

// Products of many rows, W in 4 or 8 bits, where the instruction set has them (pairs.h).
struct PairKernels {
  // As those of Kernels, value for value; at most kMaxPaired columns.
  void (*quantize)(const Plan&, int64_t k, const float* x, int64_t first, int64_t last, const Quantized& out);
  void (*forward)(const Plan&, const Weight&, const Quantized&, int64_t begin, int64_t end, float* y);
  // The largest |s| of each column over all groups, [np].
  void (*largest_scales)(const Plan&, const Weight&, float* out);
  // Rows [first, last) of step [rows, ceil(n / kPairColumns)]: dy * s is rounded to multiples of it.
  void (*backward_steps)(const Weight&, const float* largest, const float* dy, int64_t first, int64_t last, float* step);
  // As Kernels::backward; a slice's rows must be of one group.
  void (*backward)(const Weight&, const float* dy, const float* step, int64_t rows, int64_t superblock, float* dx);
};

// One instruction set's functions. All of them compute an output by the same operations in the same order whatever the
// rows and columns they are called with, so results do not depend on the number of threads, nor a row's on the others.
struct Kernels {
  // Rows [first, last) of x [rows, k], of which `out` holds all.
  void (*quantize)(const Plan&, int64_t k, const float* x, int64_t first, int64_t last, const Quantized& out);
  // y [rows, n], its columns [begin, end): begin a multiple of 32, at most kMaxColumns (one row) or kMaxTiled.
  void (*forward)(const Plan&, const Weight&, const Quantized&, int64_t begin, int64_t end, float* y);
  // The columns of one superblock in dx [rows, k], from dy [rows, n].
  void (*backward)(const Plan&, const Weight&, const float* dy, int64_t rows, int64_t superblock, float* dx);
  // One token's queries of one kv head over the slots of its cache: attend.h.
  void (*attend)(const float* q, const float* keys, const float* values, int64_t queries, int64_t visible, int64_t h,
                 float* weights, float* out);
  const PairKernels* pairs = nullptr;
};

// Products of many rows on a matrix unit: both operands as two bfloat16 planes, three products of planes each (amx.cc).
struct MatrixKernels {
  // Tiles of 16 rows that so many rows are split into, and the bytes of the planes of x [rows, depth].
  int64_t (*row_tiles)(int64_t rows);
  int64_t (*plane_bytes)(int64_t rows, int64_t depth);
  // Tiles of 16 rows [first, last) of x [rows, depth], its rows `stride` floats apart -> their part of `planes`.
  void (*split)(const float* x, int64_t stride, int64_t rows, int64_t depth, int64_t first, int64_t last,
                uint16_t* planes);
  // y [rows, n], its columns [begin, end): begin a multiple of 32, at most kMatrixColumns.
  void (*forward)(const Plan&, const Weight&, const uint16_t* planes, int64_t rows, int64_t begin, int64_t end, float* y);
  // The columns of one superblock in dx [rows, k], from the planes of dy [rows, n].
  void (*backward)(const Plan&, const Weight&, const uint16_t* planes, int64_t rows, int64_t superblock, float* dx);
  // The same with W in floats: [depth, width], or [width, depth] where it is turned; of its depth [from, to), to which
  // the planes belong and from which on y is added to. y [rows, width], its columns [begin, end): begin a multiple of 32,
  // at most kFloatColumns.
  void (*float_product)(const float* w, int64_t depth, int64_t width, bool turned, const uint16_t* planes, int64_t rows,
                        int64_t from, int64_t to, int64_t begin, int64_t end, float* y);
};

// Data, not functions: nothing compiled for an instruction set runs before the CPU is known to have it.
extern const Kernels kAvx512, kAvx2, kNeon;
extern const MatrixKernels* const kAmx;  // null where the compiler lacks the instructions

}  // namespace w4a16
