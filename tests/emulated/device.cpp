// A CUDA device in host memory: every operator of PyTorch runs by its CPU form on the same bytes. Code for GPUs then runs
// where there is none, with real numbers, and what a GPU forbids is an error here too: operands on two devices, and
// waiting for the device while a graph is captured. Speed, and what only a GPU's own kernels do, it says nothing about.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
std::atomic<int64_t> allocated{0};
bool capturing = false, refusing = false;

void wait_for_device(const char* what) {
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing: ", what);
  TORCH_CHECK(!refusing, "called a synchronizing CUDA operation: ", what);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// What keeps a block of device memory: its owner on the host.
struct Owner {
  c10::DataPtr memory;
  int64_t bytes;
  Owner(c10::DataPtr memory, int64_t bytes) : memory(std::move(memory)), bytes(bytes) { allocated += bytes; }
  ~Owner() { allocated -= bytes; }
};

c10::DataPtr on_device(c10::DataPtr memory, size_t bytes) {
  void* address = memory.get();
  auto* owner = new Owner(std::move(memory), static_cast<int64_t>(bytes));
  return {address, owner, [](void* context) { delete static_cast<Owner*>(context); }, kDevice};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override { return on_device(c10::GetCPUAllocator()->allocate(bytes), bytes); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

c10::Storage host_storage(const c10::Storage& storage) {
  c10::DataPtr view(const_cast<void*>(storage.data()), c10::Device(c10::kCPU));
  return c10::Storage(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(view), c10::GetCPUAllocator(), /*resizable=*/true);
}

at::Tensor tensor_on(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor host(const at::Tensor& x) {
  return x.defined() && x.is_cuda() ? tensor_on(host_storage(x.storage()), x, c10::DispatchKey::CPU) : x;
}

// One call's tensors: those of the device, and their views on the host.
class Call {
 public:
  at::Tensor to_host(const at::Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    for (auto& [device, view] : tensors_)
      if (device.is_same(x)) return view;
    tensors_.emplace_back(x, tensor_on(to_host(x.storage()), x, c10::DispatchKey::CPU));
    return tensors_.back().second;
  }

  c10::Storage to_host(const c10::Storage& storage) {
    if (storage.device_type() != c10::DeviceType::CUDA) return storage;
    for (auto& [device, view] : storages_)
      if (device.unsafeGetStorageImpl() == storage.unsafeGetStorageImpl()) return view;
    storages_.emplace_back(storage, host_storage(storage));
    addresses_.push_back(storage.data());
    return storages_.back().second;
  }

  c10::IValue to_host(const c10::IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isStorage()) return to_host(value.toStorage());
    if (value.isDevice()) return c10::Device(c10::kCPU);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : value.toTensorVector()) list.push_back(to_host(x));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& x : value.toOptionalTensorVector())
        list.push_back(x.has_value() ? std::optional<at::Tensor>(to_host(*x)) : std::nullopt);
      return list;
    }
    return value;
  }

  // Arguments that the call gave other memory or sizes (out=, resize_, set_).
  void update() {
    for (auto& [device, view] : tensors_) {
      c10::Storage storage = to_device(view.storage());
      auto* impl = device.unsafeGetTensorImpl();
      if (storage.unsafeGetStorageImpl() != device.storage().unsafeGetStorageImpl())
        impl->set_storage_keep_dtype(std::move(storage));
      if (view.sizes() != device.sizes() || view.strides() != device.strides() ||
          view.storage_offset() != device.storage_offset())
        impl->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
    }
  }

  at::Tensor to_device(const at::Tensor& x) {
    if (!x.defined() || !x.is_cpu()) return x;
    for (auto& [device, view] : tensors_)
      if (view.is_same(x)) return device;
    return tensor_on(to_device(x.storage()), x, c10::DispatchKey::CUDA);
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : value.toTensorVector()) list.push_back(to_device(x));
      return list;
    }
    return value;
  }

 private:
  c10::Storage to_device(const c10::Storage& storage) {
    for (size_t i = 0; i < storages_.size(); i++) {
      auto& [device, view] = storages_[i];
      if (view.unsafeGetStorageImpl() != storage.unsafeGetStorageImpl()) continue;
      if (view.data() != addresses_[i]) {  // resized: the device's own storage gets the new memory
        size_t bytes = view.nbytes();
        auto old = view.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr());
        device.unsafeGetStorageImpl()->set_data_ptr_noswap(on_device(std::move(old), bytes));
        device.unsafeGetStorageImpl()->set_nbytes(bytes);
        addresses_[i] = nullptr;
      }
      return device;
    }
    auto& known = moved_[storage.unsafeGetStorageImpl()];
    if (!known) {
      size_t bytes = storage.nbytes();
      auto* kept = new c10::Storage(storage);
      c10::DataPtr memory(const_cast<void*>(storage.data()), kept,
          [](void* context) { delete static_cast<c10::Storage*>(context); }, c10::Device(c10::kCPU));
      known = c10::Storage(c10::Storage::use_byte_size_t(), bytes, on_device(std::move(memory), bytes), &::memory, true);
    }
    return known;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
  std::vector<const void*> addresses_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> moved_;
};

void by_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call;
  const size_t arguments = op.schema().arguments().size(), results = op.schema().returns().size();
  for (size_t at = stack->size() - arguments; at < stack->size(); at++) (*stack)[at] = call.to_host((*stack)[at]);
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  call.update();
  for (size_t at = stack->size() - results; at < stack->size(); at++) (*stack)[at] = call.to_device((*stack)[at]);
}

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
    std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

at::Tensor as_strided(
    const at::Tensor& x, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset.has_value() ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt);
}

at::Tensor view(const at::Tensor& x, c10::SymIntArrayRef size) {
  return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  if (to.device() != from.device()) wait_for_device("copy between host and device");
  host(to).copy_(host(from));
  return to;
}

at::Scalar local_scalar_dense(const at::Tensor& x) {
  wait_for_device("reading a number");
  return at::_local_scalar_dense(host(x));
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
}

TORCH_LIBRARY(emulated, m) {
  c10::SetAllocator(kDevice.type(), &memory);
  m.def("allocated() -> int", [] { return allocated.load(); });
  m.def("wait() -> ()", [] { wait_for_device("synchronize"); });
  m.def("capture(bool on) -> ()", [](bool on) { capturing = on; });
  m.def("refuse(bool on) -> ()", [](bool on) { refusing = on; });
  m.def("capturing() -> bool", [] { return capturing; });
  m.def("host(Tensor x) -> Tensor", [](const at::Tensor& x) { return host(x); });  // the same memory, as the CPU's
}

}  // namespace
