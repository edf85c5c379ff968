// What DLPack 1.2 (dmlc/dlpack, dlpack.h) says of tensors of other libraries, as far as plans of calls need it.
#pragma once

#include <cstdint>

namespace uvg::dlpack {

constexpr uint32_t kMajor = 1;  // tables of another major version may lie otherwise
constexpr int32_t kCpu = 1;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// Fills a description that holds as long as nobody else runs. 0, or an error of Python.
using FromPython = int (*)(void* object, Tensor* out);

struct Header {
  uint32_t major, minor;
  Header* older;
};

struct Exchange {  // functions that are not called here are without their types
  Header header;
  void (*allocate)();
  void (*share)();
  void (*to_python)();
  FromPython describe;
  void (*stream)();
};

}  // namespace uvg::dlpack
