// Plans of calls, for uvg_engine/backends/plans.py: a Planner stands in front of a Python function on tensors of the
// CPU and does a call that it knows itself. Python's C API, as pybind11 would cost more than what is saved.
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bindings_call.h"
#include "bindings_cpu.h"
#include "common/dlpack.h"
#include "common/plans.h"

namespace py = pybind11;

namespace {

bool enabled = true;

struct Weight {
  int32_t argument;
  int64_t version;
  const void* storage;  // that the words hang on: compared only, and there as long as they are kept
  PyObject* kept;       // weak reference to what keeps the words
};

struct Made {
  PyObject *function, *arguments, *names;  // a call with keywords
};

struct CallPlan : uvg::Plan {
  std::vector<Weight> weights;
  std::vector<Made> made;
  std::vector<int32_t> results;  // what is made, or -1 for None
  bool one = false;              // the result is no tuple
  py::object held;               // what kernels read that is no argument

  CallPlan() = default;
  CallPlan(const CallPlan&) = delete;
  CallPlan& operator=(const CallPlan&) = delete;
  ~CallPlan() override {
    for (const Weight& each : weights) Py_XDECREF(each.kept);
    for (const Made& each : made) Py_XDECREF(each.function), Py_XDECREF(each.arguments), Py_XDECREF(each.names);
  }
};

// Of a call that wants a gradient: what it gives to torch, once its arguments are known to meet the rules.
struct Application : uvg::Plan {
  PyObject* function;                                // apply of an autograd.Function
  std::vector<std::pair<int32_t, PyObject*>> given;  // index of a tensor, or -1 and a value
  std::vector<int32_t> results;                      // which of those that come back; none: all, as they come
  bool one;                                          // the result is no tuple

  Application(PyObject* called, std::vector<int32_t> which, bool single)
      : function(called), results(std::move(which)), one(single) {
    Py_INCREF(function);
  }
  Application(const Application&) = delete;
  Application& operator=(const Application&) = delete;
  ~Application() override {
    Py_DECREF(function);
    for (const auto& each : given) Py_XDECREF(each.second);
  }
};

struct Planner {
  PyObject_HEAD;
  PyObject *function, *make;
  uvg::PlanTable* table;
};

py::object steal(PyObject* value) { return py::reinterpret_steal<py::object>(value); }

// What a weak reference leads to, or nothing.
py::object alive(PyObject* reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  PyWeakref_GetRef(reference, &found);
  return steal(found);
#else
  PyObject* found = PyWeakref_GetObject(reference);
  return found == Py_None ? py::object() : py::reinterpret_borrow<py::object>(found);
#endif
}

// The words of the weights, held; false where one of them is no longer what it was.
bool hold_words(const CallPlan& plan, const Call& call, std::vector<py::object>& held) {
  for (const Weight& weight : plan.weights) {
    PyObject* tensor = call.tensors[weight.argument];
    const auto version = steal(
        Py_TYPE(torch->version)->tp_descr_get(torch->version, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor))));
    if (!version || PyLong_AsLongLong(version.ptr()) != weight.version) return false;
    const auto storage = steal(PyObject_CallOneArg(torch->storage, tensor));
    if (storage.ptr() != weight.storage) return false;
    const py::object kept = alive(weight.kept);
    if (!kept) return false;
    held.push_back(steal(PyObject_GetAttr(kept.ptr(), torch->words)));  // not kept: who forgets them must see it
    if (!held.back()) return false;
  }
  return true;
}

enum class Outcome : uint8_t { kDone, kOtherAnswer, kGone };  // gone: what the plan was made for is no more

// Does the call. spoil: memory is full of NaN before.
Outcome run(const CallPlan& plan, const Call& call, bool spoil, py::object& result) {
  std::vector<py::object> held;
  if (!hold_words(plan, call, held)) return Outcome::kGone;
  std::array<py::object, kMostTensors> made;
  std::array<std::byte*, kMostTensors> addresses{};
  for (size_t i = 0; i < plan.made.size(); ++i) {
    const Made& how = plan.made[i];
    made[i] = steal(PyObject_Call(how.function, how.arguments, how.names));
    uvg::dlpack::Tensor x{};
    if (!made[i] || torch->describe(made[i].ptr(), &x) != 0) return Outcome::kGone;
    addresses[i] = static_cast<std::byte*>(x.data) + x.byte_offset;
    if (spoil && addresses[i] != nullptr) std::memset(addresses[i], 255, static_cast<size_t>(bytes_of(x)));
  }
  std::byte* scratch = plan.scratch_bytes == 0 ? nullptr : uvg::scratch_of_thread(plan.scratch_bytes);
  if (spoil && scratch != nullptr) std::memset(scratch, 255, static_cast<size_t>(plan.scratch_bytes));
  if (!plan.run({call.addresses.data(), addresses.data(), scratch})) return Outcome::kOtherAnswer;
  if (plan.one) {
    result = made[plan.results[0]];
    return Outcome::kDone;
  }
  py::tuple results(plan.results.size());
  for (size_t i = 0; i < plan.results.size(); ++i) {
    py::object each = plan.results[i] < 0 ? py::none() : made[plan.results[i]];
    PyTuple_SET_ITEM(results.ptr(), static_cast<Py_ssize_t>(i), each.release().ptr());
  }
  result = std::move(results);
  return Outcome::kDone;
}

// The result, or null with an error, which the long way would have as well.
PyObject* apply(const Application& plan, const Call& call) {
  const auto given = steal(PyTuple_New(static_cast<Py_ssize_t>(plan.given.size())));
  if (!given) return nullptr;
  for (size_t i = 0; i < plan.given.size(); ++i) {
    const auto& [argument, value] = plan.given[i];
    PyObject* each = argument < 0 ? value : call.tensors[argument];
    PyTuple_SET_ITEM(given.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(each));
  }
  py::object all = steal(PyObject_Call(plan.function, given.ptr(), nullptr));
  if (!all || plan.results.empty()) return all.release().ptr();
  auto results = steal(PyTuple_New(static_cast<Py_ssize_t>(plan.results.size())));
  for (size_t i = 0; results && i < plan.results.size(); ++i) {
    PyObject* each = PyTuple_GetItem(all.ptr(), plan.results[i]);
    if (each == nullptr) return nullptr;
    if (plan.one) return Py_NewRef(each);
    PyTuple_SET_ITEM(results.ptr(), static_cast<Py_ssize_t>(i), Py_NewRef(each));
  }
  return results.release().ptr();
}

// The key of a call that a plan is to be made of, kept while it is made.
struct Question {
  std::vector<int64_t> key;
  uint64_t hash;
  bool wants_gradient;
};

// By one of the plans, or nothing.
py::object by_a_plan(uvg::PlanTable& table, const Call& call) {
  std::vector<std::shared_ptr<const uvg::Plan>> tried;
  while (auto plan = table.find(call.key, call.hash, call.addresses.data(), tried)) {
    py::object result;
    const Outcome outcome = run(static_cast<const CallPlan&>(*plan), call, false, result);
    if (outcome == Outcome::kDone) return result;
    PyErr_Clear();  // the long way tells what is wrong
    if (outcome == Outcome::kGone) table.drop(call.hash, plan.get());
    tried.push_back(std::move(plan));
  }
  return {};
}

PyObject* planner_call(PyObject* self, PyObject* args, PyObject* kwargs) {
  auto* planner = reinterpret_cast<Planner*>(self);
  if (enabled && torch != nullptr) {
    try {
      Call call;
      if (call.read(args, kwargs)) {
        if (call.wants_gradient) {
          const auto plan = planner->table->find(call.key, call.hash, call.addresses.data(), {});
          if (plan) return apply(static_cast<const Application&>(*plan), call);
        } else if (py::object result = by_a_plan(*planner->table, call)) {
          return result.release().ptr();
        }
        if (planner->table->wanted(call.hash)) {
          const py::object question =
              py::cast(Question{{call.key.begin(), call.key.end()}, call.hash, call.wants_gradient});
          return PyObject_CallFunctionObjArgs(planner->make, self, question.ptr(), planner->function, args,
                                              kwargs == nullptr ? Py_None : kwargs, nullptr);
        }
      }
    } catch (const std::exception&) {  // the long way tells what is wrong
    }
    PyErr_Clear();
  }
  return PyObject_Call(planner->function, args, kwargs);
}

void planner_free(PyObject* self) {
  auto* planner = reinterpret_cast<Planner*>(self);
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(planner->function), Py_XDECREF(planner->make);
  delete planner->table;
  type->tp_free(self);
  Py_DECREF(type);
}

py::object new_planner(const py::object& function, const py::object& make) {
  static std::array<PyType_Slot, 3> slots{{{Py_tp_call, reinterpret_cast<void*>(planner_call)},
                                           {Py_tp_dealloc, reinterpret_cast<void*>(planner_free)},
                                           {0, nullptr}}};
  static PyType_Spec spec{"uvg_engine._cpu.Planner", sizeof(Planner), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots.data()};
  static PyObject* type = PyType_FromSpec(&spec);
  if (type == nullptr) throw py::error_already_set();
  auto* planner = PyObject_New(Planner, reinterpret_cast<PyTypeObject*>(type));
  if (planner == nullptr) throw py::error_already_set();
  planner->function = function.inc_ref().ptr(), planner->make = make.inc_ref().ptr();
  planner->table = new uvg::PlanTable;  // NOLINT: an object of C
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(planner));
}

uvg::PlanTable& table_of(const py::handle& planner) { return *reinterpret_cast<Planner*>(planner.ptr())->table; }

Call read(const py::tuple& args, const py::object& kwargs) {
  Call call;
  if (!call.read(args.ptr(), kwargs.is_none() ? nullptr : kwargs.ptr())) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    throw py::value_error("a call that is not plain");
  }
  return call;
}

// Memory that the call was given or made: (address, bytes, what it is, index, offset there).
struct Range {
  Address address;
  int64_t bytes;
  uvg::Place place;
};

uvg::Place place_of(Address address, const std::vector<Range>& ranges) {
  for (const Range& range : ranges) {
    if (address >= range.address && address < range.address + static_cast<Address>(range.bytes)) {
      uvg::Place place = range.place;
      place.offset += static_cast<int64_t>(address - range.address);
      return place;
    }
  }
  throw py::value_error("a kernel works on memory that nobody knows");
}

using Shared = std::shared_ptr<CallPlan>;

void add_values(uvg::Plan& plan, const py::list& values) {
  for (const auto& each : values) {
    const auto [argument, bytes] = each.cast<std::tuple<int32_t, std::string>>();
    plan.values.push_back({argument, {}});
    for (char byte : bytes) plan.values.back().bytes.push_back(static_cast<uint8_t>(byte));
  }
}

// given: (index of a tensor among those of the call, or -1, value).
std::shared_ptr<Application> new_application(const py::list& values, const py::object& function, const py::list& given,
                                             const std::vector<int32_t>& results, bool one) {
  auto plan = std::make_shared<Application>(function.ptr(), results, one);
  add_values(*plan, values);
  for (const auto& each : given) {
    const auto [argument, value] = each.cast<std::tuple<int32_t, py::object>>();
    plan->given.emplace_back(argument, value.inc_ref().ptr());
  }
  return plan;
}

// steps: (kernel, arguments, answer or None); ranges: (address, bytes, 0 argument | 1 made | 2 scratch | 3 fixed,
// index, offset), none of which overlap; weights: (argument, address, version, storage, weak reference to what keeps
// the words); made: (function, arguments, keywords).
Shared new_plan(const py::list& values, const py::list& steps, const py::list& ranges, const py::list& weights,
                const py::list& made, const std::vector<int32_t>& results, bool one, int64_t scratch_bytes,
                const py::object& held) {
  auto plan = std::make_shared<CallPlan>();
  add_values(*plan, values);
  std::vector<Range> known;
  for (const auto& each : ranges) {
    const auto [address, bytes, of, index, offset] = each.cast<std::tuple<Address, int64_t, int, int32_t, int64_t>>();
    known.push_back({address, bytes, {static_cast<uvg::Place::Of>(of), index, offset}});
  }
  for (const auto& each : steps) {
    const auto [name, arguments, answer] = each.cast<std::tuple<std::string, py::tuple, py::object>>();
    const auto kernel = known_kernels().find(name);
    if (kernel == known_kernels().end()) throw py::value_error(name + " is no kernel of a plan");
    Slots slots;
    kernel->second.fill(slots, arguments);
    uvg::Step step;
    step.kernel = kernel->second.kernel, step.asks = !answer.is_none();
    if (step.asks) step.answer = static_cast<int64_t>(PyLong_AsUnsignedLongLongMask(answer.ptr()));
    for (int32_t slot : slots.addresses) {
      const auto address = static_cast<Address>(slots.values[slot].whole);
      if (address != 0) step.addresses.emplace_back(slot, place_of(address, known));
    }
    step.slots = std::move(slots.values);
    plan->steps.push_back(std::move(step));
  }
  for (const auto& each : weights) {
    const auto [argument, address, version, storage, kept] =
        each.cast<std::tuple<int32_t, Address, int64_t, py::object, py::object>>();
    plan->places.emplace_back(argument, at<const std::byte>(address));
    plan->weights.push_back({argument, version, storage.ptr(), kept.inc_ref().ptr()});
  }
  for (const auto& each : made) {
    const auto [function, arguments, names] = each.cast<std::tuple<py::object, py::tuple, py::dict>>();
    plan->made.push_back({function.inc_ref().ptr(), arguments.inc_ref().ptr(), names.inc_ref().ptr()});
  }
  if (plan->made.size() > kMostTensors) throw py::value_error("too many tensors");
  for (int32_t each : results) {
    if (each < (one ? 0 : -1) || each >= static_cast<int32_t>(made.size())) throw py::value_error("no such result");
  }
  if (one && results.size() != 1) throw py::value_error("one result is one");
  plan->results = results, plan->one = one, plan->scratch_bytes = scratch_bytes, plan->held = held;
  return plan;
}

py::object prove(const Shared& plan, const py::tuple& args, const py::object& kwargs) {
  const Call call = read(args, kwargs);
  py::object result;
  const bool done = plan->fits(call.addresses.data()) && run(*plan, call, true, result) == Outcome::kDone;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return done ? result : py::none();
}

// Whether the call is still known by the same key: other threads may have changed an argument or what serves.
bool same(const Question& question, const py::tuple& args, const py::object& kwargs) {
  const Call call = read(args, kwargs);
  return std::equal(call.key.begin(), call.key.end(), question.key.begin(), question.key.end());
}

void keep(const py::object& planner, const Question& question, const std::shared_ptr<uvg::Plan>& plan) {
  const bool applies = dynamic_cast<const Application*>(plan.get()) != nullptr;
  if (applies != question.wants_gradient) throw py::value_error("a plan of another kind of call");
  table_of(planner).add(question.key, question.hash, plan);
}

void refuse(const py::object& planner, const Question& question) { table_of(planner).refuse(question.hash); }

// Whether plans can be: whether torch offers what it takes. exchange: torch's DLPack functions.
bool begin(const py::object& exchange, const py::dict& about) {
  const auto* api =
      static_cast<const uvg::dlpack::Exchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->header.major != uvg::dlpack::kMajor) {
    api = reinterpret_cast<const uvg::dlpack::Exchange*>(api->header.older);
  }
  if (api == nullptr || api->describe == nullptr) return false;
  auto made = std::make_unique<Torch>();
  const auto take = [&](const char* name) { return about[name].cast<py::object>().release().ptr(); };
  made->describe = api->describe;
  made->tensor = reinterpret_cast<PyTypeObject*>(take("tensor"));
  made->parameter = reinterpret_cast<PyTypeObject*>(take("parameter"));
  made->dtype = reinterpret_cast<PyTypeObject*>(take("dtype"));
  made->requires_grad = take("requires_grad"), made->version = take("version");
  made->is_inference = take("is_inference"), made->storage = take("storage"), made->words = take("words");
  made->grad_enabled = take("grad_enabled");
  for (py::object each : about["never"].cast<std::vector<py::object>>()) made->never.push_back(each.release().ptr());
  for (py::object each : about["functions"].cast<std::vector<py::object>>()) {
    made->functions.push_back(each.release().ptr());
  }
  for (py::object each : about["variables"].cast<std::vector<py::object>>()) {
    made->variables.push_back(each.release().ptr());
  }
  for (auto [dict, name] : about["names"].cast<std::vector<std::pair<py::dict, py::object>>>()) {
    made->names.emplace_back(dict.release().ptr(), name.release().ptr());
  }
  torch = made.release();
  return true;
}

}  // namespace

void bind_plans(py::module_& m) {
  py::class_<uvg::Plan, std::shared_ptr<uvg::Plan>>(m, "Plan");
  py::class_<CallPlan, uvg::Plan, Shared>(m, "CallPlan");
  py::class_<Application, uvg::Plan, std::shared_ptr<Application>>(m, "Application");
  py::class_<Question>(m, "PlanQuestion").def_readonly("wants_gradient", &Question::wants_gradient);
  m.def("planner", &new_planner);
  m.def("plan", &new_plan);
  m.def("plan_application", &new_application);
  m.def("plan_prove", &prove);
  m.def("plan_same", &same);
  m.def("plan_keep", &keep);
  m.def("plan_refuse", &refuse);
  m.def("plans_begin", &begin);
  m.def("plans_enable", [](bool on) { return std::exchange(enabled, on); });
  m.def("plans_of", [](const py::object& planner) { return table_of(planner).size(); });
  m.def("plans_forget", [](const py::object& planner) { table_of(planner).clear(); });
}
