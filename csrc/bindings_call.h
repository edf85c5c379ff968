// A call of a planned function: what it is known by, and where its tensors lie.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "common/dlpack.h"
#include "common/plans.h"

constexpr size_t kMostTensors = 32;
enum Tag : int64_t { kNone = 1, kTrue, kFalse, kInt, kFloat, kText, kBytes, kDtype, kTuple, kTensor };

// What is asked of torch and of the backends' state, given by `plans_begin`. It lives as long as the process.
struct Torch {
  uvg::dlpack::FromPython describe = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr, *dtype = nullptr;
  PyObject *requires_grad = nullptr, *version = nullptr;  // descriptors
  PyObject *is_inference = nullptr, *storage = nullptr;   // methods
  PyObject* words = nullptr;                              // name of what keeps a weight's words has them under
  PyObject* grad_enabled = nullptr;
  std::vector<PyObject*> never;                        // methods that have to tell no
  std::vector<PyObject*> functions;                    // their results belong to a key, as those of the next two
  std::vector<PyObject*> variables;                    // ContextVar
  std::vector<std::pair<PyObject*, PyObject*>> names;  // dict and key
};

inline Torch* torch = nullptr;

inline int64_t bytes_of(const uvg::dlpack::Tensor& x) {
  int64_t count = 1;
  for (int32_t i = 0; i < x.ndim; ++i) count *= x.shape[i];
  return count * x.bits * x.lanes / 8;
}

// A call as it is known by, and where its tensors lie. `read` is false where it has to go the long way.
class Call {
 public:
  bool read(PyObject* args, PyObject* kwargs) {
    PyObject* on = PyObject_CallNoArgs(torch->grad_enabled);
    Py_XDECREF(on);
    if (on == nullptr) return false;
    grad_ = on == Py_True;
    key.add(grad_ ? 1 : 0), key.add(PyTuple_GET_SIZE(args));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
      if (!add(PyTuple_GET_ITEM(args, i))) return false;
    }
    if (kwargs != nullptr) {
      PyObject *name = nullptr, *value = nullptr;
      Py_ssize_t at = 0;
      while (PyDict_Next(kwargs, &at, &name, &value) != 0) {
        if (!add(name) || !add(value)) return false;
      }
    }
    if (!add_state() || !key.fits()) return false;
    hash = key.hash();
    return true;
  }

  uvg::Key key;
  uint64_t hash = 0;
  bool wants_gradient = false;
  size_t count = 0;                                      // of the tensors
  std::array<const std::byte*, kMostTensors> addresses;  // NOLINT: written before it is read
  std::array<PyObject*, kMostTensors> tensors;           // NOLINT: borrowed

 private:
  bool add_state() {
    for (PyObject* function : torch->functions) {
      PyObject* value = PyObject_CallNoArgs(function);
      const bool ok = value != nullptr && add(value);
      Py_XDECREF(value);
      if (!ok) return false;
    }
    for (PyObject* variable : torch->variables) {
      PyObject* value = nullptr;
      if (PyContextVar_Get(variable, Py_None, &value) != 0) return false;
      const bool ok = add(value);
      Py_XDECREF(value);
      if (!ok) return false;
    }
    for (const auto& [dict, name] : torch->names) {
      PyObject* value = PyDict_GetItemWithError(dict, name);
      if (value == nullptr && PyErr_Occurred() != nullptr) return false;
      if (!add(value == nullptr ? Py_None : value)) return false;
    }
    return true;
  }

  bool add(PyObject* value) {
    PyTypeObject* type = Py_TYPE(value);
    if (type == torch->tensor || type == torch->parameter) return add_tensor(value);
    if (value == Py_None || value == Py_True || value == Py_False) {
      key.add(value == Py_None ? kNone : value == Py_True ? kTrue : kFalse);
    } else if (type == &PyLong_Type) {
      int overflow = 0;
      const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
      if (overflow != 0) return false;
      key.add(kInt), key.add(number);
    } else if (type == &PyFloat_Type) {
      const double number = PyFloat_AS_DOUBLE(value);
      int64_t bits = 0;
      std::memcpy(&bits, &number, sizeof(bits));
      key.add(kFloat), key.add(bits);
    } else if (type == &PyUnicode_Type) {
      Py_ssize_t length = 0;
      const char* text = PyUnicode_AsUTF8AndSize(value, &length);
      if (text == nullptr) return false;
      key.add(kText), key.add(text, static_cast<size_t>(length));
    } else if (type == &PyBytes_Type) {
      key.add(kBytes), key.add(PyBytes_AS_STRING(value), static_cast<size_t>(PyBytes_GET_SIZE(value)));
    } else if (type == torch->dtype) {                             // each lives as long as torch
      key.add(kDtype), key.add(reinterpret_cast<int64_t>(value));  // NOLINT
    } else if (type == &PyTuple_Type) {
      key.add(kTuple), key.add(PyTuple_GET_SIZE(value));
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
        PyObject* item = PyTuple_GET_ITEM(value, i);  // a number, so that it holds no tensor and no tuple in turn
        if ((Py_TYPE(item) != &PyLong_Type && Py_TYPE(item) != &PyFloat_Type) || !add(item)) return false;
      }
    } else {
      return false;
    }
    return true;
  }

  bool add_tensor(PyObject* value) {
    uvg::dlpack::Tensor x{};
    if (count == kMostTensors || torch->describe(value, &x) != 0) return false;
    if (x.device_type != uvg::dlpack::kCpu || (x.data == nullptr && bytes_of(x) != 0)) return false;
    for (PyObject* method : torch->never) {
      PyObject* told = PyObject_CallOneArg(method, value);
      Py_XDECREF(told);
      if (told != Py_False) return false;
    }
    PyObject* wants = Py_TYPE(torch->requires_grad)
                          ->tp_descr_get(torch->requires_grad, value, reinterpret_cast<PyObject*>(Py_TYPE(value)));
    Py_XDECREF(wants);
    if (wants == nullptr) return false;
    wants_gradient = wants_gradient || (grad_ && wants == Py_True);
    PyObject* inference = PyObject_CallOneArg(torch->is_inference, value);
    Py_XDECREF(inference);
    if (inference == nullptr) return false;
    const int64_t flags = (wants == Py_True ? 1 : 0) | (inference == Py_True ? 2 : 0);
    const auto* data = static_cast<const std::byte*>(x.data) + x.byte_offset;
    size_t object = 0, address = 0;  // the first argument that is the same tensor, and the first in the same place
    while (object < count && tensors[object] != value) ++object;
    while (address < count && addresses[address] != data) ++address;
    key.add(kTensor), key.add(x.code | x.bits << 8 | x.lanes << 16 | flags << 32);
    key.add(static_cast<int64_t>(object | address << 8U | static_cast<size_t>(x.ndim) << 16U));
    for (int32_t i = 0; i < x.ndim; ++i) key.add(x.shape[i]), key.add(x.strides[i]);
    tensors[count] = value, addresses[count++] = data;
    return true;
  }

  bool grad_ = false;
};
