// Cuts K into superblocks, pieces and segments (plan.h).
#pragma once

#include <algorithm>
#include <vector>

#include "plan.h"

namespace w4a16 {

// What Plan points into.
struct OwnedPlan {
  std::vector<Superblock> superblocks;
  std::vector<Piece> pieces;
  std::vector<Segment> segments;
  Plan view() const {
    return {static_cast<int64_t>(superblocks.size()), static_cast<int64_t>(pieces.size()),
            static_cast<int64_t>(segments.size()), superblocks.data(), pieces.data(), segments.data()};
  }
};

inline OwnedPlan make_plan(int64_t k, int64_t group_size) {
  OwnedPlan plan;
  for (int64_t start = 0; start < k; start += kSuperblock) {
    Superblock block{static_cast<int64_t>(plan.pieces.size()), static_cast<int64_t>(plan.segments.size()), 0, 0};
    const int64_t stop = std::min(k, start + kSuperblock);
    for (int64_t row = start; row < stop;) {
      const int64_t group = row / group_size, in_slice = (row - start) % kSlice;
      const int64_t next = std::min({stop, (group + 1) * group_size, row - in_slice + kSlice});
      if (!block.segments || plan.segments.back().group != group) {
        plan.segments.push_back({block.pieces, block.pieces, group});
        ++block.segments;
      }
      plan.pieces.push_back({static_cast<int>((row - start) / kSlice), static_cast<int>(in_slice),
                             static_cast<int>(in_slice + next - row)});
      plan.segments.back().last_piece = ++block.pieces;
      row = next;
    }
    plan.superblocks.push_back(block);
  }
  return plan;
}

}  // namespace w4a16
