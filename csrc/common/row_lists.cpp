#include "common/row_lists.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace uvg {

RowLists::RowLists(const int32_t* spans, int64_t samples, int64_t per_sample, int64_t num_rows)
    : samples_(samples), longest_(0), shared_(false) {
  std::vector<char> taken(static_cast<size_t>(num_rows), 0);
  std::vector<int32_t> all;
  std::vector<int64_t> first = {0};
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t i = b * per_sample; i < (b + 1) * per_sample; ++i) {
      const int64_t start = spans[2 * i], length = spans[2 * i + 1];
      if (length < 0 || (length > 0 && (start < 0 || start + length > num_rows)))
        throw std::invalid_argument("spans must lie in [0, " + std::to_string(num_rows) + "), got start " +
                                    std::to_string(start) + ", len " + std::to_string(length));
      for (int64_t row = start; row < start + length; ++row) {
        shared_ = shared_ || taken[static_cast<size_t>(row)] != 0;
        taken[static_cast<size_t>(row)] = 1;
        all.push_back(static_cast<int32_t>(row));
      }
    }
    first.push_back(static_cast<int64_t>(all.size()));
    longest_ = std::max(longest_, first[static_cast<size_t>(b) + 1] - first[static_cast<size_t>(b)]);
  }
  for (int64_t row = 0; row < num_rows; ++row)
    if (taken[static_cast<size_t>(row)] == 0) all.push_back(static_cast<int32_t>(row));
  first.push_back(static_cast<int64_t>(all.size()));
  std::unique_ptr<int64_t[]> firsts(new int64_t[first.size()]);  // freed if there is no memory for the rows
  rows_ = new int32_t[all.size()];
  first_ = firsts.release();
  std::copy(first.begin(), first.end(), first_);
  std::copy(all.begin(), all.end(), rows_);
}

RowLists::~RowLists() {
  delete[] first_;
  delete[] rows_;
}

int64_t RowLists::samples() const { return samples_; }

int64_t RowLists::size(int64_t list) const { return first_[list + 1] - first_[list]; }

int64_t RowLists::longest() const { return longest_; }

const int32_t* RowLists::rows(int64_t list) const { return rows_ + first_[list]; }

bool RowLists::shared() const { return shared_; }

struct Scratch::Piece {  // the line before the memory that it hands out
  Piece* before;
};

namespace {
constexpr std::align_val_t kLine{64};
}

Scratch::Scratch() : last_(nullptr) {}

Scratch::~Scratch() {
  while (last_ != nullptr) {
    Piece* piece = last_;
    last_ = piece->before;
    ::operator delete(piece, kLine);
  }
}

uint32_t* Scratch::words(int64_t count) {
  constexpr auto line = static_cast<size_t>(kLine);
  void* memory = ::operator new(line + static_cast<size_t>(count) * sizeof(uint32_t), kLine);
  last_ = new (memory) Piece{last_};
  return reinterpret_cast<uint32_t*>(static_cast<char*>(memory) + line);
}

float* Scratch::floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }

}  // namespace uvg
