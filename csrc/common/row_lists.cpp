#include "common/row_lists.h"

#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace uvg {

RowLists::RowLists(const int32_t* spans, int64_t samples, int64_t per_sample, int64_t num_rows)
    : samples_(samples), longest_(0), shared_(false) {
  if (num_rows > INT32_MAX) throw std::invalid_argument("there may be 2^31 - 1 rows, got " + std::to_string(num_rows));
  bool rising = true;  // no row comes before one of an earlier span
  int64_t end = 0, listed = 0, size = 0;
  for (int64_t i = 0; i < samples * per_sample; ++i) {
    const int64_t start = spans[2 * i], length = spans[2 * i + 1];
    if (length < 0 || (length > 0 && (start < 0 || start + length > num_rows)))
      throw std::invalid_argument("spans must lie in [0, " + std::to_string(num_rows) + "), got start " +
                                  std::to_string(start) + ", len " + std::to_string(length));
    if (i % per_sample == 0) size = 0;
    listed += length, size += length;
    longest_ = std::max(longest_, size);
    if (length == 0) continue;
    rising = rising && start >= end;
    end = start + length;
  }
  constexpr int32_t kNobody = -1;
  std::vector<int32_t> owner(rising ? 0 : static_cast<size_t>(num_rows), kNobody);   // of a row: the list before
  std::unique_ptr<int64_t[]> firsts(new int64_t[static_cast<size_t>(samples) + 2]);  // freed if there is no memory
  std::unique_ptr<bool[]> shares(new bool[static_cast<size_t>(samples) + 1]());
  rows_ = new int32_t[static_cast<size_t>(listed + num_rows)];
  first_ = firsts.release(), shares_ = shares.release();
  int32_t* to = rows_;
  const auto list = [&](int64_t from, int64_t before) {
    for (int64_t row = from; row < before; ++row) *to++ = static_cast<int32_t>(row);
  };
  for (int64_t b = 0; b < samples; ++b) {
    first_[b] = to - rows_;
    for (int64_t i = b * per_sample; i < (b + 1) * per_sample; ++i) {
      const int64_t start = spans[2 * i], length = spans[2 * i + 1];
      list(start, start + length);
      for (int64_t row = start; !rising && row < start + length; ++row) {
        int32_t& before = owner[static_cast<size_t>(row)];
        if (before != kNobody) shares_[before] = shares_[b] = shared_ = true;
        before = static_cast<int32_t>(b);
      }
    }
  }
  first_[samples] = to - rows_;
  end = 0;
  for (int64_t i = 0; rising && i < samples * per_sample; ++i) {
    if (spans[2 * i + 1] == 0) continue;
    list(end, spans[2 * i]);
    end = static_cast<int64_t>(spans[2 * i]) + spans[2 * i + 1];
  }
  if (rising) list(end, num_rows);
  for (int64_t row = 0; !rising && row < num_rows; ++row)
    if (owner[static_cast<size_t>(row)] == kNobody) list(row, row + 1);
  first_[samples + 1] = to - rows_;
}

RowLists::~RowLists() {
  delete[] first_;
  delete[] rows_;
  delete[] shares_;
}

int64_t RowLists::samples() const { return samples_; }

int64_t RowLists::size(int64_t list) const { return first_[list + 1] - first_[list]; }

int64_t RowLists::longest() const { return longest_; }

const int32_t* RowLists::rows(int64_t list) const { return rows_ + first_[list]; }

bool RowLists::shares(int64_t list) const { return shares_[list]; }

bool RowLists::shared() const { return shared_; }

struct Scratch::Piece {  // the line before the memory that it hands out
  Piece* before;
  char *next, *end;  // what is not handed out yet
};

namespace {

constexpr std::align_val_t kLine{64};
constexpr auto kLineBytes = static_cast<size_t>(kLine);

#if defined(__has_feature)
#define UVG_CLANG_ADDRESS_SANITIZER __has_feature(address_sanitizer)
#else
#define UVG_CLANG_ADDRESS_SANITIZER 0
#endif

// Bytes of memory for several pieces. With the address sanitizer none: each shall have borders of its own.
#if defined(__SANITIZE_ADDRESS__) || UVG_CLANG_ADDRESS_SANITIZER
constexpr size_t kTogether = 0;
#else
constexpr size_t kTogether = 48 << 10;
#endif

// One of kTogether bytes that a thread keeps for its next scratch: small kernels would spend more on memory than on
// their work.
struct Spare {
  void* memory = nullptr;
  bool gone = false;  // the thread ends: what is freed now is kept no more
  Spare() = default;
  Spare(const Spare&) = delete;
  Spare& operator=(const Spare&) = delete;
  ~Spare() { ::operator delete(std::exchange(memory, nullptr), kLine), gone = true; }
};
thread_local Spare spare;

}  // namespace

Scratch::Scratch() : last_(nullptr) {}

Scratch::~Scratch() {
  while (last_ != nullptr) {
    Piece* piece = last_;
    last_ = piece->before;
    if (spare.memory == nullptr && !spare.gone &&
        piece->end - reinterpret_cast<char*>(piece) == kLineBytes + kTogether) {
      spare.memory = piece;
    } else {
      ::operator delete(piece, kLine);
    }
  }
}

uint32_t* Scratch::words(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(uint32_t) + kLineBytes - 1) / kLineBytes * kLineBytes;
  if (last_ == nullptr || static_cast<size_t>(last_->end - last_->next) < bytes) {
    const size_t room = bytes < kTogether ? kTogether : bytes;
    void* memory = room == kTogether && spare.memory != nullptr ? std::exchange(spare.memory, nullptr)
                                                                : ::operator new(kLineBytes + room, kLine);
    char* first = static_cast<char*>(memory) + kLineBytes;
    auto* piece = new (memory) Piece{last_, first, first + room};
    if (bytes >= kTogether && last_ != nullptr) {  // the piece that has room left stays the last one
      piece->before = std::exchange(last_->before, piece);
      return reinterpret_cast<uint32_t*>(first);
    }
    last_ = piece;
  }
  char* first = last_->next;
  last_->next += bytes;
  return reinterpret_cast<uint32_t*>(first);
}

float* Scratch::floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }

}  // namespace uvg
