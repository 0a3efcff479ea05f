// The Python module normwise.kernels._cpu: it chooses the instruction set, finds torch's threads and calls the kernels.
//
// It is written against Python's stable ABI and links neither torch nor an OpenMP library, so that one build serves
// every Python and every torch. Tensors come as addresses; kernels/cpu.py has checked them.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <atomic>
#include <cstring>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "call.h"
#include "commit.h"
#include "pages.h"

using normwise::Backward;
using normwise::Call;
using normwise::Forward;
using normwise::Kernels;
using normwise::Statistics;
using normwise::Team;

extern "C" {
extern const Kernels normwise_kernels_portable;
#ifdef NW_HAS_AVX2
extern const Kernels normwise_kernels_avx2;
#endif
#ifdef NW_HAS_AVX512
extern const Kernels normwise_kernels_avx512;
#endif
}

namespace {

// --- instruction sets ---------------------------------------------------------------------------------------------

struct Offered {
  const Kernels* kernels;
  bool supported;
};

// What was built, the widest first, and whether this processor has it.
template <class Visit>
void each_offered(Visit visit) {
#ifdef NW_HAS_AVX512
  visit(Offered{&normwise_kernels_avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                              __builtin_cpu_supports("avx512vl") &&
                                              __builtin_cpu_supports("avx512dq") &&
                                              __builtin_cpu_supports("avx512bf16")});
#endif
#ifdef NW_HAS_AVX2
  visit(Offered{&normwise_kernels_avx2,
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
#endif
  visit(Offered{&normwise_kernels_portable, true});
}

const Kernels* widest() {
  const Kernels* found = nullptr;
  each_offered([&](Offered offered) {
    if (!found && offered.supported) found = offered.kernels;
  });
  return found;
}

std::atomic<const Kernels*> active{nullptr};

// --- threads ------------------------------------------------------------------------------------------------------

using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
Parallel parallel = nullptr;       // libgomp's, which torch has loaded and whose threads it uses
int (*thread_number)() = nullptr;  // among those of `parallel`
std::atomic<bool> forked{false};   // in a forked child the threads of the parent are gone

// Items that one thread begins with: neighbours, so that what it has read or written once lies in its own cache when it
// comes again, and the processor sees one stream. Others help where it is late.
struct alignas(64) Share {
  std::atomic<int64_t> taken;
  int64_t first, size;
};

constexpr int kMostShares = 256;

struct Job {
  Share* shares;
  int count;
  bool from_last;
  void (*body)(void*, int64_t);
  void* context;
};

void work(void* data) {
  const Job& job = *static_cast<Job*>(data);
  const int own = thread_number();
  for (int i = 0; i < job.count; ++i) {
    Share& share = job.shares[(own + i) % job.count];
    if (share.taken.load(std::memory_order_relaxed) >= share.size) continue;
    for (int64_t n; (n = share.taken.fetch_add(1, std::memory_order_relaxed)) < share.size;)
      job.body(job.context, share.first + (job.from_last ? share.size - 1 - n : n));
  }
}

void run(const Team& team, int64_t items, bool from_last, void (*body)(void*, int64_t), void* context) {
  Share shares[kMostShares];
  const int64_t most = team.threads < kMostShares ? team.threads : kMostShares;
  const int count = int(most < items ? most : items);
  for (int i = 0; i < count; ++i) {
    const int64_t first = items * i / count;
    shares[i].taken.store(0, std::memory_order_relaxed);
    shares[i].first = first, shares[i].size = items * (i + 1) / count - first;
  }
  Job job = {shares, count, from_last, body, context};
  // All threads, though some may find nothing: for fewer libgomp ends the others, and makes new ones the next time.
  parallel(work, &job, unsigned(team.threads), 0);
}

// --- Python -------------------------------------------------------------------------------------------------------

constexpr int64_t kSmall = 1 << 15;  // elements below which threads cost more than they give

bool read_call(PyObject* given, Call* call) {
  char* bytes;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(given, &bytes, &size) < 0) return false;
  if (size != Py_ssize_t(sizeof(Call))) {
    PyErr_Format(PyExc_ValueError, "a call has %zd bytes, not %zd", sizeof(Call), size);
    return false;
  }
  std::memcpy(call, bytes, sizeof(Call));
  return true;
}

// Addresses, 0 for none, and counts.
template <int kCount>
bool read_integers(PyObject* const* args, Py_ssize_t count, long long* numbers) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "takes %d addresses and counts, not %zd", kCount, count);
    return false;
  }
  for (int i = 0; i < kCount; ++i) {
    numbers[i] = PyLong_AsLongLong(args[i]);
    if (numbers[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

bool read_double(PyObject* given, double* number) {
  *number = PyFloat_AsDouble(given);
  return *number != -1 || !PyErr_Occurred();
}

template <class E>
E* at(long long address) {
  return reinterpret_cast<E*>(static_cast<uintptr_t>(address));
}

bool is_streamed(const Call& call, const void* output) {
  return call.engine == normwise::kRuns &&
         normwise::pays_to_stream(output, call.size() * (call.dtype == normwise::kFloat32 ? 4 : 2));
}

Team team_for(const Call& call, long long threads) {
  const bool alone = call.size() < kSmall || !parallel || !thread_number || forked.load(std::memory_order_relaxed);
  return {alone ? 1 : int(threads), run};
}

// Reads a call and its integers, and runs a kernel on them while other threads of Python go on.
template <int kCount, class Kernel>
PyObject* launched(PyObject* const* args, Py_ssize_t count, Kernel kernel) {
  Call call;
  long long n[kCount];
  if (!read_integers<kCount>(args + 1, count - 1, n) || !read_call(args[0], &call)) return nullptr;
  bool ok;
  Py_BEGIN_ALLOW_THREADS;
  ok = kernel(call, n);
  Py_END_ALLOW_THREADS;
  if (!ok) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// forward(call, x, residual, sum, y, weight, bias, mask, mean, inverse, m2, count, threads)
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return launched<12>(args, count, [](const Call& call, const long long* n) {
    void* y = at<void>(n[3]);
    const Statistics statistics = {at<double>(n[7]), at<double>(n[8]), at<double>(n[9]), at<double>(n[10])};
    const Forward tensors = {at<void>(n[0]),      at<void>(n[1]),  at<void>(n[2]),    y,
                             at<float>(n[4]),     at<float>(n[5]), at<uint8_t>(n[6]), statistics,
                             is_streamed(call, y)};
    return active.load()->forward(call, tensors, team_for(call, n[11]));
  });
}

// backward(call, x, d_y, d_sum, d_x, weight, bias, mask, mean, inverse, count, d_weight, d_bias, threads)
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return launched<13>(args, count, [](const Call& call, const long long* n) {
    void* d_x = at<void>(n[3]);
    const Statistics statistics = {at<double>(n[7]), at<double>(n[8]), nullptr, at<double>(n[9])};
    const Backward tensors = {at<void>(n[0]),   at<void>(n[1]),   at<void>(n[2]),        d_x,
                              at<float>(n[4]),  at<float>(n[5]),  at<uint8_t>(n[6]),     statistics,
                              at<float>(n[10]), at<float>(n[11]), is_streamed(call, d_x)};
    return active.load()->backward(call, tensors, team_for(call, n[12]));
  });
}

// commit(mean, m2, running_mean, running_spread, batches, columns, divisor, rate): whether the batch entered.
PyObject* commit(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long n[6];
  double divisor, rate;
  if (!read_integers<6>(args, count - 2, n) || !read_double(args[6], &divisor) || !read_double(args[7], &rate))
    return nullptr;
  const normwise::Entry entry = {at<double>(n[0]), at<double>(n[1]), divisor};
  const normwise::Memory memory = {at<float>(n[2]), at<float>(n[3]), at<int64_t>(n[4]), n[5]};
  return PyBool_FromLong(normwise::commit(entry, rate, memory));
}

// recall(running_mean, running_spread, rows, columns, eps)
PyObject* recall(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long n[4];
  double eps;
  if (!read_integers<4>(args, count - 1, n) || !read_double(args[4], &eps)) return nullptr;
  normwise::recall({at<float>(n[0]), at<float>(n[1]), nullptr, n[3]}, eps, at<double>(n[2]));
  Py_RETURN_NONE;
}

// streams(address, bytes)
PyObject* streams(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long n[2];
  if (!read_integers<2>(args, count, n)) return nullptr;
  return PyBool_FromLong(normwise::pays_to_stream(at<void>(n[0]), n[1]));
}

PyObject* last_cache(PyObject*, PyObject*) { return PyLong_FromLongLong(normwise::last_cache()); }

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(active.load()->name); }

PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  each_offered([&](Offered offered) {
    PyObject* name = names && offered.supported ? PyUnicode_FromString(offered.kernels->name) : nullptr;
    if (name) PyList_Append(names, name);
    Py_XDECREF(name);
  });
  return names;
}

PyObject* use(PyObject*, PyObject* wanted) {
  const Kernels* found = nullptr;
  const char* name = PyUnicode_AsUTF8AndSize(wanted, nullptr);
  if (!name) return nullptr;
  each_offered([&](Offered offered) {
    if (offered.supported && std::strcmp(offered.kernels->name, name) == 0) found = offered.kernels;
  });
  if (!found) return PyErr_Format(PyExc_ValueError, "no kernels for '%s' on this processor", name);
  active.store(found);
  Py_RETURN_NONE;
}

PyObject* threads(PyObject*, PyObject*) { return PyUnicode_FromString(parallel ? "libgomp" : "none"); }

PyMethodDef methods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL, nullptr},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(backward)), METH_FASTCALL, nullptr},
    {"commit", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(commit)), METH_FASTCALL, nullptr},
    {"recall", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(recall)), METH_FASTCALL, nullptr},
    {"streams", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(streams)), METH_FASTCALL,
     "Whether an output at an address, of so many bytes, is written past the caches where its runs allow it."},
    {"last_cache", last_cache, METH_NOARGS, "From how many bytes on that may be."},
    {"instruction_set", instruction_set, METH_NOARGS, "The instruction set in use."},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Those that this processor has, the widest first."},
    {"use", use, METH_O, "Use an instruction set, by name."},
    {"threads", threads, METH_NOARGS, "Whose threads the kernels use, or 'none'."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  active.store(widest());
#if !defined(_WIN32)
  parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  thread_number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif
  return PyModule_Create(&definition);
}
