// The rows that may be among the k nearest of a query, while their distances are known up to intervals.
#pragma once
#include "cpu/core/memory-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// A row, and the low end of the interval that holds its squared distance; once it is evaluated, the distance.
struct Candidate {
  double low;
  int64_t n;  // the row, or ~row once it is evaluated
  bool evaluated() const { return n < 0; }
  int64_t row() const { return n < 0 ? ~n : n; }
  void evaluate(double sq_dist) {
    low = sq_dist == sq_dist ? sq_dist : kInf;  // a row that is NaN comes last
    n = ~n;
  }
};
static int nearer(const void* a, const void* b) {
  const Candidate &x = *(const Candidate*)a, &y = *(const Candidate*)b;
  return x.low < y.low ? -1 : x.low > y.low ? 1 : x.row() < y.row() ? -1 : x.row() > y.row();
}
// Ascending: by distance, and by row among equals. All of them are evaluated.
static void sort_candidates(Candidate* list, int64_t count) {
  qsort((void*)list, count, sizeof(Candidate), nearer);
}

// The candidates of one query among the rows of one part.
struct Candidates {
  Candidate* list;  // [capacity]
  double* high;     // [k] a heap of the least high ends, the largest on top
  int64_t count, highs, k, capacity;

  // No row beyond it is among the k nearest.
  double reach() const { return highs == k ? high[0] : kInf; }

  // A row whose squared distance lies between low and high_end, or of which nothing is known if these are
  // infinite. exact(n) evaluates that of row n.
  template <class Exact>
  void add(int64_t n, double low, double high_end, const Exact& exact) {
    if (count == capacity) make_room(exact);
    Candidate& one = list[count++];
    one.low = low;
    one.n = n;
    if (!(high_end < kInf)) {
      one.evaluate(exact(n));
      high_end = one.low;
    }
    add_high(high_end);
  }
  // The high ends of another part of the rows count here too.
  void take_reach(const Candidates& other) {
    for (int64_t i = 0; i < other.highs; i++) add_high(other.high[i]);
  }

 private:
  void add_high(double v) {
    int64_t i;
    if (highs < k) {
      for (i = highs++; i > 0 && high[(i - 1) / 2] < v; i = (i - 1) / 2) high[i] = high[(i - 1) / 2];
    } else {
      if (!(v < high[0])) return;
      for (i = 0; 2 * i + 1 < k;) {
        const int64_t left = 2 * i + 1, right = imin(left + 1, k - 1);
        const int64_t child = high[left] < high[right] ? right : left;
        if (!(v < high[child])) break;
        high[i] = high[child];
        i = child;
      }
    }
    high[i] = v;
  }
  // Drops the rows beyond reach. Where that leaves too many, because their intervals overlap, they are
  // evaluated and the k nearest are kept. Each row is evaluated once, and what a sort costs is shared by more
  // than k rows that came after the last one.
  template <class Exact>
  void make_room(const Exact& exact) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i++)
      if (!(list[i].low > reach())) list[kept++] = list[i];
    count = kept;
    if (count <= capacity / 4 * 3) return;
    for (int64_t i = 0; i < count; i++)
      if (!list[i].evaluated()) list[i].evaluate(exact(list[i].n));
    sort_candidates(list, count);
    count = imin(count, k);
    highs = 0;
    for (int64_t i = 0; i < count; i++) add_high(list[i].low);
  }
};

// The candidates of a block of queries in all parts of the rows.
class CandidateLists {
 public:
  // rows: of a part, at most. No list can grow beyond them.
  bool reserve(int64_t b, int parts, int64_t k, int64_t rows) {
    b_ = b;
    parts_ = parts;
    const int64_t capacity = imin(2 * k + 64, rows), all = b * parts;
    if (!arena_.reserve(Arena::bytes<Candidates>(all) + Arena::bytes<Candidate>(all * capacity) +
                        Arena::bytes<double>(all * k)))
      return false;
    lists_ = arena_.take<Candidates>(all);
    Candidate* list = arena_.take_raw<Candidate>(all * capacity);
    double* high = arena_.take_raw<double>(all * k);
    for (int64_t i = 0; i < all; i++) {
      Candidates& c = lists_[i];
      c.k = k;
      c.capacity = capacity;
      c.list = list + (i % b * parts + i / b) * capacity;  // the parts of a query side by side
      c.high = high + i * k;
    }
    return true;
  }
  void clear() {
    for (int64_t i = 0; i < b_ * parts_; i++) lists_[i].count = lists_[i].highs = 0;
  }
  // [b] those of one part.
  Candidates* of(int part) { return lists_ + part * b_; }

 private:
  Candidates* lists_;
  int64_t b_;
  int parts_;
  Arena arena_;
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
