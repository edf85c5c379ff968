// What every kernel is put through without Python: every dtype, every instruction set that runs here, 1, 2, 3 and 40
// threads with the same bits, arrays exactly as long as they have to be (so that a sanitizer sees their ends), outputs
// poisoned with NaN. Values are held against plain loops in double; the 2x rule is the Python tests'.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/dtype.h"
#include "common/pack_values.h"
#include "common/philox.h"
#include "common/threads.h"
#include "tests/check.h"

namespace uvg::test {

// Memory as torch's: it begins a cache line, so that results may go past the cache (cpu/stream.h).
template <typename T>
struct OnLines {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  OnLines() = default;
  template <typename U>
  OnLines(const OnLines<U>&) {}  // NOLINT: as the standard has it
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  friend bool operator==(const OnLines&, const OnLines&) { return true; }
  friend bool operator!=(const OnLines&, const OnLines&) { return false; }
};

// One array of floats in a dtype, on the heap by itself. Empty is a null pointer.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, int64_t size) : dtype_(dtype), bytes_(size * (dtype == Dtype::kFloat32 ? 4 : 2), 0xFF) {}

  // Reproducible values between -scale and scale.
  static Array random(Dtype dtype, int64_t size, uint32_t seed, float scale = 1.0f) {
    Array array(dtype, size);
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t bits = philox4x32({static_cast<uint32_t>(i), seed, 0, 0}, {1, 2}).w0;
      array.set(i, scale * (2.0f * philox_uniform(bits) - 1.0f));
    }
    return array;
  }

  void* data() { return bytes_.empty() ? nullptr : bytes_.data(); }
  float* floats() { return static_cast<float*>(data()); }  // of a fp32 array
  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / (dtype_ == Dtype::kFloat32 ? 4 : 2); }
  bool same_bits(const Array& other) const { return bytes_ == other.bytes_; }

  float operator[](int64_t i) const {
    float value = 0;
    const size_t size = dtype_ == Dtype::kFloat32 ? 4 : 2;
    const PackValuesParams p{&bytes_[size * i], 1, 1, 1, 1, dtype_, Dtype::kFloat32, &value};
    pack_values(p);
    return value;
  }

  void set(int64_t i, float value) {
    if (dtype_ == Dtype::kFloat32) {
      std::memcpy(&bytes_[4 * i], &value, 4);
    } else if (dtype_ == Dtype::kFloat16) {
      Float16 half{};
      convert(value, half);
      std::memcpy(&bytes_[2 * i], &half, 2);
    } else {
      uint32_t bits = 0;
      std::memcpy(&bits, &value, 4);
      const auto high = static_cast<uint16_t>(bits >> 16);  // truncated: the values are arbitrary
      std::memcpy(&bytes_[2 * i], &high, 2);
    }
  }

  // `count` values of another array, times `scale`.
  void copy(int64_t to, const Array& other, int64_t from, int64_t count, float scale) {
    for (int64_t i = 0; i < count; ++i) set(to + i, scale * other[from + i]);
  }

 private:
  Dtype dtype_ = Dtype::kFloat32;
  std::vector<uint8_t, OnLines<uint8_t>> bytes_;
};

using Arrays = std::vector<Array>;
using Truth = std::vector<std::vector<double>>;  // of the first arrays; the others have none

// The largest difference as a share of the largest value; NaN where one is NaN.
inline double worst(const Array& got, const std::vector<double>& want) {
  double far = 0, largest = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(got[i] - want[i]);
    if (std::isnan(difference)) return difference;
    far = std::max(far, difference);
    largest = std::max(largest, std::abs(want[i]));
  }
  return far == 0 ? 0 : far / largest;
}

inline std::vector<double> values(const Array& array) {
  std::vector<double> out;
  for (int64_t i = 0; i < array.size(); ++i) out.push_back(array[i]);
  return out;
}

inline std::vector<std::string> usable_isas() {
  std::vector<std::string> out;
  for (Isa isa : compiled_isas()) {
    for (Isa runs : supported_isas()) {
      if (isa == runs) out.emplace_back(isa_name(isa));
    }
  }
  return out;
}

// run(dtype, threads): the outputs of a kernel, made anew. truth(dtype): the first of them, in double.
inline void everywhere(const std::function<Arrays(Dtype, int)>& run, const std::function<Truth(Dtype)>& truth) {
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    const double slack = dtype == Dtype::kFloat32 ? 1e-4 : (dtype == Dtype::kFloat16 ? 4e-3 : 3e-2);  // of the largest
    Truth want = truth(dtype);
    for (const std::string& isa : usable_isas()) {
      use_isa(isa);
      const Arrays got = run(dtype, 1);
      for (size_t i = 0; i < got.size(); ++i) {
        if (i == want.size()) want.push_back(values(got[i]));  // of the generic kernel: the others must agree
        CHECK(worst(got[i], want[i]) <= slack);
      }
      for (int threads : {2, 3, 40}) {  // many: work is cut finer for them
        const Arrays again = run(dtype, threads);
        for (size_t i = 0; i < got.size(); ++i) CHECK(again[i].same_bits(got[i]));
      }
    }
  }
}

}  // namespace uvg::test
