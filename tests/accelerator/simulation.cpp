// A simulated accelerator for PyTorch: each stream is a thread with a queue, and operators run there on the CPU, later.
//
// Memory that was not written yet, or is freed, holds NaN, so that a read which is not ordered shows. See device.py.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>

namespace py = pybind11;
using at::IValue;
using at::Tensor;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int kDevices = 2;
constexpr auto kType = c10::DeviceType::PrivateUse1;

// Settings and records -----------------------------------------------------------------------------------------------

struct Settings {
  double latency = 0.0;  // seconds from the launch of an operator to its start
  double cost = 0.0;     // seconds that each operator takes
  size_t capacity = 0;   // launches that may wait in a queue; a further one blocks the host. 0: any number
  bool held = false;     // stands still
  bool alternates = false;  // its streams take turns, operator by operator, while they have something to do
  bool failed = false;   // every call raises, as after a device-side assertion
};

struct Wait {
  uint64_t thread;
  std::string what;
  std::string stack;
};

std::mutex records_mutex;
std::vector<Wait> waits;
std::map<uint64_t, int64_t> launches;
std::set<std::pair<uint64_t, int>> touches;
bool no_float64 = false;
std::atomic<bool> stopped{false};

uint64_t thread_id() { return static_cast<uint64_t>(pthread_self()); }

std::string python_stack() {
  if (!Py_IsInitialized()) return "";
  py::gil_scoped_acquire gil;
  auto lines = py::module_::import("traceback").attr("format_stack")();
  return py::str("").attr("join")(lines).cast<std::string>();
}

void note_wait(const std::string& what) {
  auto stack = python_stack();
  std::lock_guard<std::mutex> lock(records_mutex);
  waits.push_back({thread_id(), what, stack});
}

// Runs a wait without the GIL where this thread holds it.
template <class F>
void without_gil(F wait) {
  if (Py_IsInitialized() && PyGILState_Check()) {
    py::gil_scoped_release release;
    wait();
  } else {
    wait();
  }
}

// Streams ------------------------------------------------------------------------------------------------------------

thread_local std::atomic<bool>* waiting_here = nullptr;  // in the thread of a stream: whether it waits for another

struct Flag {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  void set() {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    changed.notify_all();
  }
  void wait() {
    if (waiting_here != nullptr) *waiting_here = true;
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return done; });
    if (waiting_here != nullptr) *waiting_here = false;
  }
  bool query() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};

using Work = std::function<void()>;

struct Graph {
  std::vector<Work> works;
  std::vector<Tensor> kept;
  bool broken = false;
};

struct Stream {
  int device;
  int64_t id;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::pair<Work, Clock::time_point>> queue;
  Graph* capture = nullptr;
  std::atomic<int64_t> done{0};
  std::atomic<bool> busy{false};
  std::atomic<bool> waiting{false};
  void run();
  void take_turn();
};

struct Device {
  Settings settings;
  std::vector<Stream*> streams;
};

std::mutex devices_mutex;  // of the lists of streams and of captures
Device devices[kDevices];
std::vector<Graph*> graphs;
std::atomic<int> capturing{0};
thread_local int current_device = 0;
thread_local Stream* current_streams[kDevices] = {};

Stream* new_stream(int device) {
  std::lock_guard<std::mutex> lock(devices_mutex);
  auto& streams = devices[device].streams;
  auto* stream = new Stream;
  stream->device = device;
  stream->id = static_cast<int64_t>(streams.size());
  streams.push_back(stream);
  std::thread([stream] { stream->run(); }).detach();
  return stream;
}

Stream* stream_at(int device, int64_t id) {
  if (devices[device].streams.empty()) new_stream(device);
  std::lock_guard<std::mutex> lock(devices_mutex);
  return devices[device].streams.at(id);
}

Stream* current_stream(int device) {
  auto*& stream = current_streams[device];
  if (stream == nullptr) stream = stream_at(device, 0);
  return stream;
}

void check(int device) {
  {
    std::lock_guard<std::mutex> lock(records_mutex);
    touches.insert({thread_id(), device});
  }
  TORCH_CHECK(!devices[device].settings.failed, "sim:", device, " failed: device-side assertion");
}

// Calls that are forbidden while any stream of the process captures, but for those on the capturing stream.
void unsafe(const char* what) {
  if (!capturing) return;
  std::lock_guard<std::mutex> lock(devices_mutex);
  for (auto* graph : graphs) graph->broken = true;
  TORCH_CHECK(false, "operation not permitted while a stream is capturing: ", what);
}

// Waits until the other streams that have something to do have done as much, but not for ever: they may wait for this.
void Stream::take_turn() {
  std::vector<Stream*> others;
  {
    std::lock_guard<std::mutex> lock(devices_mutex);
    others = devices[device].streams;
  }
  auto late = [&](Stream* other) { return other->busy && !other->waiting && other->done < done; };
  auto latest = Clock::now() + std::chrono::milliseconds(20);
  while (std::any_of(others.begin(), others.end(), late) && Clock::now() < latest) {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

void Stream::run() {
  auto& settings = devices[device].settings;
  waiting_here = &waiting;
  std::unique_lock<std::mutex> lock(mutex);
  while (true) {
    changed.wait(lock, [&] { return stopped || (!queue.empty() && (!settings.held || settings.failed)); });
    if (stopped) return;
    if (settings.failed) {  // nothing that was queued is ever done
      queue.clear();
      changed.notify_all();
      continue;
    }
    auto ready = queue.front().second;
    if (Clock::now() < ready) {
      changed.wait_until(lock, ready);
      continue;
    }
    Work work = std::move(queue.front().first);
    lock.unlock();
    if (settings.alternates) take_turn();
    if (settings.cost > 0) std::this_thread::sleep_for(std::chrono::duration<double>(settings.cost));
    try {
      c10::InferenceMode no_inference(false);
      at::AutoDispatchBelowADInplaceOrView guard;
      work();
    } catch (const std::exception& error) {
      fprintf(stderr, "sim:%d: an operator failed: %s\n", device, error.what());
    }
    work = nullptr;
    lock.lock();
    if (!queue.empty()) queue.pop_front();
    ++done;
    busy = !queue.empty();
    changed.notify_all();
  }
}

void enqueue(Stream* stream, Work work) {
  auto& settings = devices[stream->device].settings;
  auto ready = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(settings.latency));
  if (settings.alternates && !stream->busy) {  // begins where the others are
    std::lock_guard<std::mutex> lock(devices_mutex);
    for (auto* other : devices[stream->device].streams) stream->done = std::max<int64_t>(stream->done, other->busy ? other->done.load() : 0);
  }
  std::unique_lock<std::mutex> lock(stream->mutex);
  stream->queue.emplace_back(std::move(work), ready);
  stream->busy = true;
  stream->changed.notify_all();
}

// Queues an operator on a stream, or adds it to the graph that the stream captures.
void launch(Stream* stream, Work work) {
  check(stream->device);
  {
    std::lock_guard<std::mutex> lock(records_mutex);
    ++launches[thread_id()];
  }
  if (stream->capture != nullptr) {
    stream->capture->works.push_back(std::move(work));
    return;
  }
  auto& settings = devices[stream->device].settings;
  if (settings.capacity) {
    without_gil([&] {
      std::unique_lock<std::mutex> lock(stream->mutex);
      stream->changed.wait(lock, [&] {
        return stream->queue.size() < settings.capacity || settings.failed || !settings.capacity;
      });
    });
  }
  enqueue(stream, std::move(work));
}

std::shared_ptr<Flag> record(Stream* stream) {
  auto flag = std::make_shared<Flag>();
  enqueue(stream, [flag] { flag->set(); });
  return flag;
}

void wait_for(int device, const std::shared_ptr<Flag>& flag, const std::string& what) {
  check(device);
  unsafe(what.c_str());
  note_wait(what);
  without_gil([&] {
    std::unique_lock<std::mutex> lock(flag->mutex);
    while (!flag->done && !devices[device].settings.failed) {
      flag->changed.wait_for(lock, std::chrono::milliseconds(20));
    }
  });
  check(device);
}

void synchronize(Stream* stream, const std::string& what) { wait_for(stream->device, record(stream), what); }

// Memory -------------------------------------------------------------------------------------------------------------

struct Block {
  void* memory;
  size_t bytes;
  Stream* home;
  Graph* graph;
  std::vector<Stream*> also;
};

std::mutex blocks_mutex;
std::multimap<std::pair<Stream*, size_t>, void*> freed;  // overwritten memory, mapped for ever: a late read is no crash

void spoil(void* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }  // NaN in every floating-point type

void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  if (stopped || block->memory == nullptr || devices[block->home->device].settings.failed) return;
  auto memory = block->memory;
  auto bytes = block->bytes;
  auto home = block->home;
  if (block->graph != nullptr) {  // replays use it
    if (home->capture == block->graph) block->graph->works.push_back([=] { spoil(memory, bytes); });
    return;
  }
  for (auto* other : block->also) {
    auto flag = record(other);
    enqueue(home, [flag] { flag->wait(); });
  }
  enqueue(home, [=] {
    spoil(memory, bytes);
    std::lock_guard<std::mutex> lock(blocks_mutex);
    freed.insert({{home, bytes}, memory});
  });
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    int device = current_device;
    check(device);
    auto* stream = current_stream(device);
    if (capturing && stream->capture == nullptr) unsafe("allocation");
    c10::Device on(kType, static_cast<c10::DeviceIndex>(device));
    void* memory = nullptr;
    if (bytes) {
      std::lock_guard<std::mutex> lock(blocks_mutex);
      auto found = stream->capture == nullptr ? freed.find({stream, bytes}) : freed.end();
      if (found != freed.end()) {
        memory = found->second;
        freed.erase(found);
      } else {
        TORCH_CHECK(posix_memalign(&memory, 64, bytes) == 0, "no memory");
        spoil(memory, bytes);
      }
    }
    return {memory, new Block{memory, bytes, stream, stream->capture, {}}, &free_block, on};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;

void free_pinned(void* memory) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(reinterpret_cast<uintptr_t>(memory));
  }
  free(memory);
}

bool is_pinned(const void* memory) {
  auto address = reinterpret_cast<uintptr_t>(memory);
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(address);
  if (after == pinned.begin()) return false;
  --after;
  return address < after->first + after->second;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, 64, std::max<size_t>(bytes, 1)) == 0, "no memory");
    spoil(memory, bytes);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[reinterpret_cast<uintptr_t>(memory)] = std::max<size_t>(bytes, 1);
    return {memory, memory, &free_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t count) const override { std::memcpy(to, from, count); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;
REGISTER_ALLOCATOR(kType, &device_allocator)

// Guard, hooks -------------------------------------------------------------------------------------------------------

struct Event {
  std::shared_ptr<Flag> flag;
  int device;
  Clock::time_point at;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto old = getDevice();
    current_device = device.index();
    return old;
  }
  c10::Device getDevice() const override { return {kType, static_cast<c10::DeviceIndex>(current_device)}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  static c10::Stream wrap(Stream* stream) {
    return c10::Stream(c10::Stream::UNSAFE, {kType, static_cast<c10::DeviceIndex>(stream->device)}, stream->id);
  }
  static Stream* unwrap(const c10::Stream& stream) { return stream_at(stream.device_index(), stream.id()); }
  c10::Stream getStream(c10::Device device) const override {
    return wrap(current_stream(device.has_index() ? device.index() : current_device));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return wrap(stream_at(device.index(), 0)); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    int index = device.has_index() ? device.index() : current_device;
    stream_at(index, 0);
    return wrap(new_stream(index));
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto old = current_stream(stream.device_index());
    current_streams[stream.device_index()] = unwrap(stream);
    return wrap(old);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device, const c10::EventFlag) const override {
    check(stream.device_index());
    TORCH_CHECK(device == -1 || device == stream.device_index(), "an event of one device, a stream of another");
    if (*event == nullptr) *event = new Event;
    auto* mine = static_cast<Event*>(*event);
    mine->device = stream.device_index();
    auto* target = unwrap(stream);
    if (target->capture != nullptr) {
      mine->flag = std::make_shared<Flag>();
      mine->flag->set();
      return;
    }
    mine->flag = std::make_shared<Flag>();
    enqueue(target, [flag = mine->flag, mine] { flag->set(); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    check(stream.device_index());
    if (event == nullptr) return;
    auto* target = unwrap(stream);
    if (target->capture != nullptr) return;
    enqueue(target, [flag = static_cast<Event*>(event)->flag] { flag->wait(); });
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    auto* mine = static_cast<Event*>(event);
    check(mine->device);
    unsafe("event query");
    return mine->flag->query();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream& stream) const override {
    check(stream.device_index());
    unsafe("stream query");
    auto* mine = unwrap(stream);
    std::lock_guard<std::mutex> lock(mine->mutex);
    return mine->queue.empty();
  }
  void synchronizeStream(const c10::Stream& stream) const override { synchronize(unwrap(stream), "stream"); }
  bool isStreamCapturing(const c10::Stream& stream) const override { return unwrap(stream)->capture != nullptr; }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    auto* mine = static_cast<Event*>(event);
    wait_for(mine->device, mine->flag, "event");
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    std::vector<Stream*> streams;
    {
      std::lock_guard<std::mutex> lock(devices_mutex);
      streams = devices[device].streams;
    }
    for (auto* stream : streams) synchronize(stream, "device");
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    if (data.get_deleter() == &free_block) static_cast<Block*>(data.get_context())->also.push_back(unwrap(stream));
  }
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current_device = device; }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    auto old = current_device;
    current_device = device;
    return static_cast<c10::DeviceIndex>(old);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
};
const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();

// Operators ----------------------------------------------------------------------------------------------------------

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

Tensor empty_on(int device, c10::IntArrayRef sizes, c10::IntArrayRef strides, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(!(no_float64 && (dtype == at::kDouble || dtype == at::kComplexDouble)), "sim has no float64");
  c10::DeviceGuard guard({kType, static_cast<c10::DeviceIndex>(device)});
  return at::detail::empty_strided_generic(
      sizes, strides, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

// The device's memory as the CPU sees it: only the stream's thread may read or write it.
Tensor as_cpu(const Tensor& tensor) {
  auto* memory = tensor.numel() ? tensor.data_ptr() : nullptr;
  return at::from_blob(memory, tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU));
}

template <class F>
IValue map_tensors(const IValue& value, F change) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      changed.push_back(tensor && tensor->defined() ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    }
    return changed;
  }
  if (value.isDevice()) return IValue(c10::Device(c10::kCPU));
  return value;
}

template <class F>
void each_tensor(const IValue& value, F see) {
  map_tensors(value, [&](const Tensor& tensor) {
    see(tensor);
    return tensor;
  });
}

void describe(std::ostream& out, const IValue& value) {
  if (value.isTensor() || value.isTensorList() || value.isOptionalTensorList()) {
    out << '[';
    each_tensor(value, [&](const Tensor& t) {
      out << static_cast<int>(t.scalar_type()) << t.sizes() << t.strides() << t.device().type()
          << t.unsafeGetTensorImpl()->is_wrapped_number() << ';';
    });
    out << ']';
  } else if (value.isGenerator()) {
    out << 'g';
  } else {
    out << value << ',';
  }
}

struct Shape {
  bool defined = false;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype = at::kFloat;
};

struct Returned {
  int argument = -1;  // is this argument
  bool list = false;
  std::vector<Shape> shapes;
  IValue value;  // neither tensor nor list
  bool is_value = false;
};

struct Metadata {
  std::vector<Returned> returned;
  std::vector<std::pair<int, std::vector<int64_t>>> resized;  // outputs that were given with another shape
  bool unknown = false;
};

Shape shape_of(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {true, tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type()};
}

Tensor as_meta(const Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

int aliased(const c10::FunctionSchema& schema, const c10::AliasInfo& alias) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* mine = schema.arguments()[i].alias_info();
    if (mine != nullptr && mine->isWrite() && mine->beforeSets() == alias.beforeSets()) return static_cast<int>(i);
  }
  return -1;
}

Metadata ask_meta(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
  const auto& schema = op.schema();
  Metadata known;
  std::vector<IValue> given;
  for (const auto& argument : arguments) {
    given.push_back(argument.isDevice() ? IValue(c10::Device(c10::kMeta)) : map_tensors(argument, as_meta));
  }
  auto stack = given;
  try {
    op.callBoxed(&stack);
  } catch (const std::exception& error) {
    if (getenv("SIM_DEBUG")) fprintf(stderr, "%s: %.300s\n", schema.name().c_str(), error.what());
    known.unknown = true;  // its metadata depend on the data, or the call is wrong: the CPU will tell
    return known;
  }
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias == nullptr || !alias->isWrite() || !given[i].isTensor()) continue;
    if (given[i].toTensor().sizes() != arguments[i].toTensor().sizes()) {
      known.resized.emplace_back(static_cast<int>(i), given[i].toTensor().sizes().vec());
    }
  }
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    Returned returned;
    const auto* alias = schema.returns()[i].alias_info();
    if (alias != nullptr) {
      returned.argument = aliased(schema, *alias);
      TORCH_CHECK(returned.argument >= 0, "sim: the view ", schema.name(), " is not simulated");
    } else if (stack[i].isTensor()) {
      returned.shapes.push_back(shape_of(stack[i].toTensor()));
    } else if (stack[i].isTensorList()) {
      returned.list = true;
      for (const Tensor& tensor : stack[i].toTensorVector()) returned.shapes.push_back(shape_of(tensor));
    } else {
      returned.is_value = true;
      returned.value = stack[i];
    }
    known.returned.push_back(std::move(returned));
  }
  return known;
}

Metadata metadata(const c10::OperatorHandle& op, const std::vector<IValue>& arguments) {
  static std::mutex mutex;
  static std::map<std::string, Metadata> cache;
  std::ostringstream key;
  key << op.schema().name() << '.' << op.schema().overload_name() << '(';
  for (const auto& argument : arguments) describe(key, argument);
  {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = cache.find(key.str());
    if (found != cache.end()) return found->second;
  }
  auto known = ask_meta(op, arguments);
  std::lock_guard<std::mutex> lock(mutex);
  cache[key.str()] = known;
  return known;
}

Tensor& resize(Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> = std::nullopt);

int device_of(const std::vector<IValue>& arguments) {
  int device = -1;
  for (const auto& argument : arguments) {
    if (argument.isDevice() && device < 0 && argument.toDevice().has_index()) device = argument.toDevice().index();
    each_tensor(argument, [&](const Tensor& tensor) {
      if (!on_device(tensor)) {
        TORCH_CHECK(tensor.dim() == 0 || tensor.device().is_meta(), "a tensor on the CPU, others on sim");
        return;
      }
      TORCH_CHECK(device < 0 || device == tensor.device().index(), "tensors on two devices");
      device = tensor.device().index();
    });
  }
  return device < 0 ? current_device : device;
}

std::vector<IValue> on_cpu(const std::vector<IValue>& arguments) {
  std::vector<IValue> changed;
  for (const auto& argument : arguments) {
    changed.push_back(map_tensors(argument, [](const Tensor& tensor) {
      return on_device(tensor) ? as_cpu(tensor) : tensor.device().is_cpu() && !tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor.clone() : tensor;
    }));
  }
  return changed;
}

// Random numbers are drawn as on a GPU: by a seed that the host took when it launched the operator, not by what the
// CPU's generator has come to when the stream does.
std::vector<IValue> with_own_seed(const c10::OperatorHandle& op, std::vector<IValue> arguments) {
  const auto& named = op.schema().arguments();
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (named[i].name() != "generator" || !arguments[i].isNone()) continue;
    auto shared = at::detail::getDefaultCPUGenerator();
    uint64_t seed;
    {
      std::lock_guard<std::mutex> lock(shared.mutex());
      seed = at::check_generator<at::CPUGeneratorImpl>(shared)->random64();
    }
    arguments[i] = IValue(at::detail::createCPUGenerator(seed));
  }
  return arguments;
}

// The result depends on the data: waits for the device.
std::vector<IValue> run_now(const c10::OperatorHandle& op, int device, const std::vector<IValue>& arguments) {
  synchronize(current_stream(device), op.schema().name());
  auto stack = on_cpu(arguments);
  op.callBoxed(&stack);
  std::vector<IValue> results;
  for (size_t i = 0; i < op.schema().returns().size(); ++i) {
    const auto* alias = op.schema().returns()[i].alias_info();
    if (alias != nullptr) {
      results.push_back(arguments[aliased(op.schema(), *alias)]);
      continue;
    }
    results.push_back(map_tensors(stack[i], [&](const Tensor& tensor) {
      auto moved = empty_on(device, tensor.sizes(), tensor.strides(), tensor.scalar_type());
      as_cpu(moved).copy_(tensor);
      return moved;
    }));
  }
  return results;
}

std::vector<IValue> run(const c10::OperatorHandle& op, std::vector<IValue> arguments) {
  int device = device_of(arguments);
  check(device);
  c10::DeviceGuard guard({kType, static_cast<c10::DeviceIndex>(device)});
  auto known = metadata(op, arguments);
  if (known.unknown) return run_now(op, device, arguments);
  for (auto& [index, sizes] : known.resized) {
    auto tensor = arguments[index].toTensor();
    resize(tensor, sizes);
  }
  std::vector<IValue> results;
  std::vector<std::vector<Tensor>> targets;
  for (const auto& returned : known.returned) {
    std::vector<Tensor> made, seen;
    for (const auto& shape : returned.shapes) {
      made.push_back(shape.defined ? empty_on(device, shape.sizes, shape.strides, shape.dtype) : Tensor());
      seen.push_back(shape.defined ? as_cpu(made.back()) : Tensor());
    }
    targets.push_back(seen);
    if (returned.argument >= 0) {
      results.push_back(arguments[returned.argument]);
    } else if (returned.is_value) {
      results.push_back(returned.value);
    } else if (returned.list) {
      results.push_back(c10::List<Tensor>(made));
    } else {
      results.push_back(made.at(0));
    }
  }
  auto* stream = current_stream(device);
  launch(stream, [op, inputs = with_own_seed(op, on_cpu(arguments)), targets] {
    auto stack = inputs;
    op.callBoxed(&stack);
    for (size_t i = 0; i < targets.size(); ++i) {
      size_t place = 0;
      if (!targets[i].empty()) {
        each_tensor(stack[i], [&](const Tensor& result) {
          if (targets[i][place].defined()) targets[i][place].copy_(result);
          ++place;
        });
      }
    }
  });
  return results;
}

void run_boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack, size_t count) {
  std::vector<IValue> arguments(stack->end() - count, stack->end());
  stack->resize(stack->size() - count);
  for (auto& result : run(op, std::move(arguments))) stack->push_back(std::move(result));
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  run_boxed(op, stack, op.schema().arguments().size());
}

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void convolution(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  run_boxed(find("aten::convolution"), stack, 9);
}

void convolution_backward(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  std::vector<IValue> given(stack->end() - 10, stack->end());
  stack->resize(stack->size() - 10);
  std::vector<int64_t> bias{given[0].toTensor().size(1)};
  given.insert(given.begin() + 3, given[9].toBoolList().get(2) ? IValue(bias) : IValue());
  for (auto& result : run(find("aten::convolution_backward"), given)) stack->push_back(std::move(result));
}

// By bernoulli_, which is given a seed: the CPU's own kernel takes its numbers when the stream comes to it.
std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, std::optional<bool> train) {
  if (!train.value_or(true)) return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  auto mask = at::empty_like(input).bernoulli_(1.0 - p);
  return {(input * mask).mul_(p < 1.0 ? 1.0 / (1.0 - p) : 0.0), mask.to(at::kBool)};
}

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto like = at::empty(sizes, at::TensorOptions().dtype(dtype).device(at::kMeta), format);
  return empty_on(device && device->has_index() ? device->index() : current_device, sizes, like.strides(), like.scalar_type());
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  return empty_on(device && device->has_index() ? device->index() : current_device, sizes, strides,
                  dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype())));
}

Tensor& resize(Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  size_t needed = (impl->numel() + impl->storage_offset()) * impl->dtype().itemsize();
  if (needed <= storage->nbytes()) return self;
  c10::DeviceGuard guard(self.device());
  auto grown = device_allocator.allocate(needed);
  auto *from = storage->mutable_data(), *to = grown.get();
  auto bytes = storage->nbytes();
  if (bytes) launch(current_stream(self.device().index()), [=] { std::memcpy(to, from, bytes); });
  storage->set_data_ptr(std::move(grown));
  storage->set_nbytes(needed);
  return self;
}

const Tensor& resize_op(const Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  auto mutable_self = self;
  resize(mutable_self, sizes, format);
  return self;
}

Tensor as_strided(const Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

Tensor view(const Tensor& self, c10::IntArrayRef sizes) {
  return at::native::view(self, sizes);
}

Tensor view_as_real(const Tensor& self) { return at::native::view_as_real(self); }
Tensor view_as_complex(const Tensor& self) { return at::native::view_as_complex(self); }

Tensor reshape_alias(const Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::_reshape_alias(self, sizes, strides);
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::cpu::set_(self, source, offset, sizes, strides);
}

// As cudaMemcpyAsync: pinned memory is read or written when the stream comes to it, other memory of the host at once.
Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  if (!self.numel()) return dst;
  Tensor source = self;
  if (self.sizes() != dst.sizes()) source = self.expand(dst.sizes());
  if (on_device(source) && on_device(dst)) {
    auto* stream = current_stream(source.device().index());
    auto* other = current_stream(dst.device().index());
    if (other != stream) {
      auto flag = record(other);
      enqueue(stream, [flag] { flag->wait(); });
    }
    launch(stream, [to = as_cpu(dst), from = as_cpu(source)]() mutable { to.copy_(from); });
    if (other != stream) {
      auto flag = record(stream);
      enqueue(other, [flag] { flag->wait(); });
    }
    return dst;
  }
  bool downwards = on_device(source);
  const Tensor& host = downwards ? dst : source;
  auto* stream = current_stream((downwards ? source : dst).device().index());
  bool late = non_blocking && is_pinned(host.data_ptr());
  if (!late) TORCH_CHECK(stream->capture == nullptr, "operation not permitted when stream is capturing: a blocking copy");
  if (downwards) {
    launch(stream, [to = dst, from = as_cpu(source)]() mutable { to.copy_(from); });
  } else {
    launch(stream, [to = as_cpu(dst), from = source]() mutable { to.copy_(from); });
  }
  if (!late) synchronize(stream, downwards ? "copy to the host" : "copy from the host");
  return dst;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  auto target = dst;
  resize(target, self.sizes());
  return copy_from(self, dst, false);
}

at::Scalar local_scalar(const Tensor& self) {
  auto* stream = current_stream(self.device().index());
  TORCH_CHECK(stream->capture == nullptr, "operation not permitted when stream is capturing: item");
  synchronize(stream, "item");
  return as_cpu(self).item();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("native_dropout", dropout);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_op);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

// Python -------------------------------------------------------------------------------------------------------------

void notify_all(int device) {
  std::vector<Stream*> streams;
  {
    std::lock_guard<std::mutex> lock(devices_mutex);
    streams = devices[device].streams;
  }
  for (auto* stream : streams) {
    std::lock_guard<std::mutex> lock(stream->mutex);
    stream->changed.notify_all();
  }
}

void set(int device, double latency, double cost, size_t capacity, bool held, bool alternates, bool failed) {
  py::gil_scoped_release release;
  if (alternates) {
    std::lock_guard<std::mutex> lock(devices_mutex);
    for (auto* stream : devices[device].streams) stream->done = 0;
  }
  devices[device].settings = {latency, cost, capacity, held, alternates, failed};
  notify_all(device);
}

Graph* capture_begin() {
  auto* graph = new Graph;
  std::lock_guard<std::mutex> lock(devices_mutex);
  current_streams[current_device]->capture = graph;
  graphs.push_back(graph);
  ++capturing;
  return graph;
}

void capture_end(Graph* graph) {
  std::lock_guard<std::mutex> lock(devices_mutex);
  for (auto& device : devices) {
    for (auto* stream : device.streams) {
      if (stream->capture == graph) stream->capture = nullptr;
    }
  }
  graphs.erase(std::remove(graphs.begin(), graphs.end(), graph), graphs.end());
  --capturing;
  TORCH_CHECK(!graph->broken, "operation failed due to a previous error during capture");
}

void replay(Graph* graph) {
  auto* stream = current_stream(current_device);
  for (const auto& work : graph->works) launch(stream, work);
}

void stop() {
  py::gil_scoped_release release;
  stopped = true;
  for (int device = 0; device < kDevices; ++device) notify_all(device);
}

}  // namespace

PYBIND11_MODULE(SIM_NAME, m) {
  py::class_<Graph, std::unique_ptr<Graph, py::nodelete>>(m, "Graph")
      .def("end", &capture_end)
      .def("replay", &replay);
  m.def("capture", &capture_begin, py::return_value_policy::reference);
  m.def("set", &set);
  m.def("sleep", [](double seconds) {
    launch(current_stream(current_device), [=] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); });
  });
  m.def("stop", &stop);
  m.def("set_float64", [](bool available) { no_float64 = !available; });
  m.def("current_device", [] { return current_device; });
  m.def("set_device", [](int device) { current_device = device; });
  m.def("is_capturing", [] { return current_stream(current_device)->capture != nullptr; });
  m.def("launches", [](uint64_t thread) {
    std::lock_guard<std::mutex> lock(records_mutex);
    return launches[thread];
  });
  m.def("waits", [] {
    std::vector<std::tuple<uint64_t, std::string, std::string>> seen;
    std::lock_guard<std::mutex> lock(records_mutex);
    for (const auto& wait : waits) seen.emplace_back(wait.thread, wait.what, wait.stack);
    return seen;
  });
  m.def("touches", [] {
    std::lock_guard<std::mutex> lock(records_mutex);
    return touches;
  });
  m.def("forget", [] {
    std::lock_guard<std::mutex> lock(records_mutex);
    waits.clear();
    touches.clear();
    launches.clear();
  });
}
