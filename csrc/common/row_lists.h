// The rows that each sample of a packed batch owns, one index after the other; and aligned memory to work in.
//
// Nothing here is inline or a template of the standard library: kernels include it in the code of several instruction
// sets.
#pragma once

#include <cstdint>

namespace uvg {

// Sample b owns the rows of its spans in their order. One list more, number `samples`, has the rows of no sample.
class RowLists {
 public:
  // spans: [samples, per_sample] of (start, len). Throws std::invalid_argument on spans outside [0, num_rows).
  RowLists(const int32_t* spans, int64_t samples, int64_t per_sample, int64_t num_rows);
  ~RowLists();
  RowLists(const RowLists&) = delete;
  RowLists& operator=(const RowLists&) = delete;

  int64_t samples() const;
  int64_t size(int64_t list) const;
  int64_t longest() const;
  const int32_t* rows(int64_t list) const;
  bool shares(int64_t list) const;  // a row of it is in another list too, or twice in this one
  bool shared() const;              // so it is of any list

 private:
  int64_t samples_, longest_;
  int64_t* first_;  // of each list in rows_
  int32_t* rows_;
  bool *shares_, shared_;
};

// Memory that is handed out piece by piece, each on a cache line of its own, and freed at once. Not zeroed.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint32_t* words(int64_t count);
  float* floats(int64_t count);

 private:
  struct Piece;
  Piece* last_;
};

}  // namespace uvg
