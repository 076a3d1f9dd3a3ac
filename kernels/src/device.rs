//! The device: finding the driver, memory, streams, graphs and launches, each failure named.
//!
//! The driver's library is opened when it is first asked for and never linked, so the same binary
//! starts on hosts without one. Nothing here panics for what a host lacks. What never happens here:
//! the shape of an op; those stand beside their kernels in `ops`.

use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError, result, sys};
use plimsoll_contract::abilities::{CUDA_COMPUTE_MAJOR_MIN, CUDA_MAJOR_MIN};

use crate::cuda::{Family, NoImage, image};

/// Why a device cannot be used, or stopped being usable.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// `libcuda` was not found: no NVIDIA driver, or a container without access to it.
    #[error("no CUDA driver: libcuda was not found on this host")]
    NoDriver,
    #[error(
        "the CUDA driver is of CUDA {major}.{minor}, and the kernels need {CUDA_MAJOR_MIN}.0 or newer: update the driver to 580 or later"
    )]
    OldDriver { major: i32, minor: i32 },
    #[error("the CUDA driver shows {count} devices and number {ordinal} was asked for")]
    NoDevice { ordinal: usize, count: i32 },
    #[error(
        "{name} has compute capability {major}.{minor}, and the kernels need {CUDA_COMPUTE_MAJOR_MIN}.0 or newer"
    )]
    UnknownCard { name: String, major: i32, minor: i32 },
    #[error(transparent)]
    NoImage(#[from] NoImage),
    #[error("{bytes} bytes of device memory for {purpose} were not to be had")]
    OutOfMemory {
        purpose: &'static str,
        bytes: usize,
        /// What the card had left at that moment.
        left: usize,
    },
    /// A defect of ours: every row of a step has its result when the step is over.
    #[error("a step ended without its results")]
    NoResult,
    #[error("the CUDA driver failed to {doing}: {source}")]
    Driver { doing: &'static str, source: DriverError },
}

/// A place in device memory that holds elements of `T`.
#[repr(transparent)]
pub struct Pointer<T>(u64, PhantomData<*mut T>);

impl<T> Clone for Pointer<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Pointer<T> {}

impl<T> std::fmt::Debug for Pointer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

// SAFETY: a pointer is an address that only the device follows; the thread that holds it does not matter.
unsafe impl<T> Send for Pointer<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Pointer<T> {}

impl<T> Pointer<T> {
    /// What an op leaves out: the kernel sees a null pointer.
    pub const NULL: Self = Self(0, PhantomData);

    /// The place `elements` further on.
    #[must_use]
    #[allow(
        clippy::should_implement_trait,
        reason = "named as the standard library's pointers name it"
    )]
    pub fn add(self, elements: usize) -> Self {
        Self(self.0 + (elements * size_of::<T>()) as u64, PhantomData)
    }

    /// The same place, read as another type.
    #[must_use]
    pub fn cast<U>(self) -> Pointer<U> {
        Pointer(self.0, PhantomData)
    }

    #[must_use]
    pub fn is_null(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn address(self) -> u64 {
        self.0
    }
}

/// Device memory, given back when it is dropped. Aligned to 256 bytes at least.
#[derive(Debug)]
pub struct Buffer {
    address: u64,
    bytes: usize,
    context: Arc<CudaContext>,
}

impl Buffer {
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Its beginning.
    #[must_use]
    pub fn pointer<T>(&self) -> Pointer<T> {
        Pointer(self.address, PhantomData)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the address came from the driver and is given back once. The driver waits for
            // kernels that may still use it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Host memory that the device reads and writes directly. Holds plain numbers only.
#[derive(Debug)]
pub struct Pinned<T: Plain> {
    at: *mut T,
    device: u64,
    len: usize,
    context: Arc<CudaContext>,
}

/// Types of which every bit pattern is a value, without padding.
///
/// # Safety
/// The implementer promises just that, and that the kernel's struct has the same layout.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for i32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for half::bf16 {}
// SAFETY: numbers one after the other.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

// SAFETY: the memory is owned and holds plain numbers.
unsafe impl<T: Plain> Send for Pinned<T> {}

impl<T: Plain> Pinned<T> {
    /// The same memory as the device sees it.
    #[must_use]
    pub fn pointer(&self) -> Pointer<T> {
        Pointer(self.device, PhantomData)
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A value that the device may have written meanwhile.
    #[must_use]
    pub fn read(&self, index: usize) -> T {
        assert!(index < self.len, "{index} lies within {} elements", self.len);
        // SAFETY: within the allocation; volatile because the device writes behind the compiler's back.
        unsafe { self.at.add(index).read_volatile() }
    }

    /// One 32-bit word of a value that the device may be writing.
    #[must_use]
    pub fn word(&self, index: usize, word: usize) -> u32 {
        assert!(index < self.len, "{index} lies within {} elements", self.len);
        assert!((word + 1) * size_of::<u32>() <= size_of::<T>(), "a value has that many words");
        // SAFETY: the word is within the allocation and plain; volatile as above.
        unsafe { self.at.add(index).cast::<u32>().add(word).read_volatile() }
    }

    /// All of it, for filling before a copy. The device must not be using it.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the allocation holds `len` elements, any bits are a value, and `&mut` excludes others.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T: Plain> Drop for Pinned<T> {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it came from `malloc_host` and is given back once.
            let _ = unsafe { result::free_host(self.at.cast()) };
        }
    }
}

/// A loaded kernel, ready for launches with up to the shared memory it was asked for with.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
}

// SAFETY: a handle that the driver allows on any thread; its module lives as long as the device.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// The shape of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Blocks of a cluster, per dimension; `[1, 1, 1]` is none (and all that cards before sm_90 know).
    pub cluster: [u32; 3],
    /// The kernel begins with `griddepcontrol.wait`, so that it may be started before its predecessor
    /// is done (programmatic dependent launch; ignored where it is not Hopper's image that runs).
    pub early: bool,
}

/// Steps recorded once and replayed with one call.
pub struct Graph(CudaGraph);

// SAFETY: replayed by whoever owns it, one thread at a time.
unsafe impl Send for Graph {}

/// A mark in the stream, with the device's clock.
pub struct Mark(CudaEvent);

/// An opened device. One thread at a time uses it.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: Mutex<HashMap<&'static str, sys::CUmodule>>,
    capability: (i32, i32),
    processors: u32,
}

// SAFETY: module handles are used under the mutex and are valid on every thread.
unsafe impl Send for Device {}
// SAFETY: as above; launches go to one stream, whose order the driver keeps.
unsafe impl Sync for Device {}

impl Device {
    /// Opens a device.
    ///
    /// # Errors
    /// [`DeviceError`] names what is missing, or what the driver refused to do.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        // SAFETY: it opens the driver's library, whose initialisers are sound to run, and no more.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceError::NoDriver);
        }
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }
            .result()
            .map_err(failed("tell its version"))?;
        if i64::from(version) < 1000 * CUDA_MAJOR_MIN.cast_signed() {
            return Err(DeviceError::OldDriver {
                major: version / 1000,
                minor: version % 1000 / 10,
            });
        }
        let count = CudaContext::device_count().map_err(failed("count the devices"))?;
        if ordinal >= count.max(0) as usize {
            return Err(DeviceError::NoDevice { ordinal, count });
        }
        let context = CudaContext::new(ordinal).map_err(failed("open the device"))?;
        // SAFETY: one stream is used, so nothing needs the events that would order several.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().map_err(failed("tell its capability"))?;
        if i64::from(capability.0) < CUDA_COMPUTE_MAJOR_MIN.cast_signed() {
            let name = context.name().unwrap_or_default();
            let (major, minor) = capability;
            return Err(DeviceError::UnknownCard { name, major, minor });
        }
        image(Family::ALL[0])?;
        let processors = context
            .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
            .map_err(failed("count its processors"))?;
        let stream = context.new_stream().map_err(failed("make a stream"))?;
        let modules = Mutex::new(HashMap::new());
        Ok(Self { context, stream, modules, capability, processors: processors as u32 })
    }

    /// The card's name as its driver gives it.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn name(&self) -> Result<String, DeviceError> {
        self.context.name().map_err(failed("name the device"))
    }

    /// Compute capability, as (9, 0) for Hopper.
    #[must_use]
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// Whether code for sm_90a runs here: wgmma, bulk copies, clusters.
    #[must_use]
    pub fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }

    /// Bytes of its memory that the card moves in a microsecond by its data sheet: two transfers a clock, as wide as the bus.
    /// None where the driver does not say.
    #[must_use]
    pub fn memory_speed(&self) -> Option<f64> {
        use sys::CUdevice_attribute as Attribute;
        let kilohertz = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE);
        let bits = self.context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH);
        let (kilohertz, bits) = (f64::from(kilohertz.ok()?), f64::from(bits.ok()?));
        (kilohertz > 0.0 && bits > 0.0).then_some(2.0 * kilohertz / 1e3 * bits / 8.0)
    }

    /// Streaming multiprocessors.
    #[must_use]
    pub fn processors(&self) -> u32 {
        self.processors
    }

    /// Bytes of device memory: free now, and all there are.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.context.mem_get_info().map_err(failed("tell its memory"))
    }

    /// Makes the device current for the calling thread. Every thread that uses it does so once.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn bind(&self) -> Result<(), DeviceError> {
        self.context.bind_to_thread().map_err(failed("bind to a thread"))
    }

    /// Memory whose content is not set.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the purpose, or what the driver says.
    pub fn allocate(&self, bytes: usize, purpose: &'static str) -> Result<Buffer, DeviceError> {
        self.bind()?;
        // SAFETY: nothing reads it before it is written; freed by `Buffer`.
        match unsafe { result::malloc_sync(bytes.max(256)) } {
            Ok(address) => Ok(Buffer { address, bytes, context: self.context.clone() }),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let left = self.memory().map_or(0, |(free, _)| free);
                Err(DeviceError::OutOfMemory { purpose, bytes, left })
            }
            Err(source) => Err(DeviceError::Driver { doing: "allocate memory", source }),
        }
    }

    /// As [`Device::allocate`], all bytes 0.
    ///
    /// # Errors
    /// As there.
    pub fn zeroed(&self, bytes: usize, purpose: &'static str) -> Result<Buffer, DeviceError> {
        let buffer = self.allocate(bytes, purpose)?;
        self.fill(&buffer, 0)?;
        Ok(buffer)
    }

    /// Sets every byte, in stream order.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<(), DeviceError> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: within the allocation.
        unsafe { result::memset_d8_async(buffer.address, byte, buffer.bytes, stream) }
            .map_err(failed("set memory"))
    }

    /// Host memory that both sides see, all zero. Reads by the host are cached.
    ///
    /// # Errors
    /// Only when the driver refuses.
    pub fn pinned<T: Plain>(&self, len: usize) -> Result<Pinned<T>, DeviceError> {
        self.bind()?;
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        let bytes = (len * size_of::<T>()).max(1);
        // SAFETY: freed by `Pinned`; zeroed before anybody reads it.
        let at = unsafe { result::malloc_host(bytes, flags) }.map_err(failed("pin host memory"))?;
        // SAFETY: the allocation is `bytes` long.
        unsafe { at.cast::<u8>().write_bytes(0, bytes) };
        let mut device = 0;
        // SAFETY: asks for the device's address of the allocation just made.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut device, at, 0) }
            .result()
            .map_err(failed("map host memory"))?;
        Ok(Pinned { at: at.cast(), device, len, context: self.context.clone() })
    }

    /// Copies plain values to the device and waits for it.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn upload<T: Plain>(&self, to: Pointer<T>, from: &[T]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's pointer leads to room for `from`; the copy is over before it returns.
        unsafe { result::memcpy_htod_async(to.0, from, self.stream.cu_stream()) }
            .map_err(failed("copy to the device"))?;
        self.synchronize()
    }

    /// Queues a copy of the first `len` elements of pinned memory, which stays as it is until the copy
    /// is done.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn upload_pinned<T: Plain>(
        &self,
        to: Pointer<T>,
        from: &Pinned<T>,
        len: usize,
    ) -> Result<(), DeviceError> {
        assert!(len <= from.len, "{len} of {} elements", from.len);
        // SAFETY: within the pinned allocation, which holds plain values.
        let from = unsafe { std::slice::from_raw_parts(from.at, len) };
        // SAFETY: the caller's pointer leads to room for `from`.
        unsafe { result::memcpy_htod_async(to.0, from, self.stream.cu_stream()) }
            .map_err(failed("copy to the device"))
    }

    /// Waits for all that is queued and copies plain values back.
    ///
    /// # Errors
    /// What a kernel queued before did wrong shows here.
    pub fn download<T: Plain>(&self, from: Pointer<T>, to: &mut [T]) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller's pointer leads to as many elements; the copy is over before it returns.
        unsafe { result::memcpy_dtoh_async(to, from.0, self.stream.cu_stream()) }
            .map_err(failed("copy from the device"))?;
        self.synchronize()
    }

    /// Queues a copy within the device.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn copy<T>(&self, to: Pointer<T>, from: Pointer<T>, len: usize) -> Result<(), DeviceError> {
        let bytes = len * size_of::<T>();
        // SAFETY: the caller's pointers lead to `len` elements each.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream.cu_stream()) }
            .map_err(failed("copy on the device"))
    }

    /// Waits for all that is queued.
    ///
    /// # Errors
    /// What a kernel queued before did wrong shows here.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.stream.synchronize().map_err(failed("finish its work"))
    }

    /// A kernel of a family, which is loaded when it is first asked for. `shared_bytes` is the most
    /// dynamic shared memory that it will be launched with.
    ///
    /// # Errors
    /// A name that is not in the image of this card, or more shared memory than a block may have.
    pub fn kernel(
        &self,
        family: Family,
        name: &'static str,
        shared_bytes: u32,
    ) -> Result<Kernel, DeviceError> {
        self.bind()?;
        let module = self.module(family)?;
        let c_name = CString::new(name).expect("a kernel's name has no zero");
        // SAFETY: the module lives as long as the process.
        let function = unsafe { result::module::get_function(module, c_name) }
            .map_err(failed("find a kernel"))?;
        if shared_bytes > 48 * 1024 {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            unsafe {
                result::function::set_function_attribute(function, attribute, shared_bytes as i32)
            }
            .map_err(failed("give a kernel its shared memory"))?;
        }
        Ok(Kernel { function, name })
    }

    fn module(&self, family: Family) -> Result<sys::CUmodule, DeviceError> {
        let mut modules = self.modules.lock().expect("no holder of the lock panics");
        if let Some(module) = modules.get(family.name()) {
            return Ok(*module);
        }
        // SAFETY: the image is a whole fatbin. Modules stay loaded: kernels hold handles of them.
        let module = unsafe { result::module::load_data(image(family)?.as_ptr().cast()) }
            .map_err(failed("load a family of kernels"))?;
        modules.insert(family.name(), module);
        Ok(module)
    }

    /// Queues a kernel whose one parameter is `arguments`.
    ///
    /// # Errors
    /// Only when the driver refuses the launch.
    ///
    /// # Safety
    /// `A` has the layout of the kernel's parameter, and its pointers lead to memory of the shapes that
    /// the kernel documents, which stays until the stream has passed it.
    pub unsafe fn launch<A: Copy>(
        &self,
        kernel: Kernel,
        grid: Grid,
        arguments: &A,
    ) -> Result<(), DeviceError> {
        let mut attributes = [no_attribute(); 2];
        let config = self.config(grid, &mut attributes);
        let mut parameters = [(&raw const *arguments).cast_mut().cast::<c_void>()];
        // SAFETY: one parameter, of the caller's promised layout; the driver copies it at the call.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        launched.result().map_err(failed(kernel.name))
    }

    /// How many clusters of a grid's shape the card runs at once: it grants them within groups of processors, whose sizes
    /// differ from card to card.
    ///
    /// # Errors
    /// What the driver says.
    pub fn clusters_at_once(&self, kernel: Kernel, grid: Grid) -> Result<u32, DeviceError> {
        let mut attributes = [no_attribute(); 2];
        let config = self.config(grid, &mut attributes);
        let mut clusters = 0;
        // SAFETY: both pointers lead to values that outlive the call.
        let asked = unsafe {
            sys::cuOccupancyMaxActiveClusters(&raw mut clusters, kernel.function, &raw const config)
        };
        asked.result().map_err(failed("count the clusters that fit"))?;
        Ok(u32::try_from(clusters).unwrap_or(0))
    }

    /// What the driver is told of a grid. Holds a pointer to `attributes`.
    fn config(
        &self,
        grid: Grid,
        attributes: &mut [sys::CUlaunchAttribute; 2],
    ) -> sys::CUlaunchConfig {
        // Newer cards run PTX of sm_80, which has neither clusters nor the wait that an early start needs.
        let hopper = self.is_hopper();
        let mut count = 0;
        if hopper && grid.cluster != [1, 1, 1] {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let [x, y, z] = grid.cluster;
            attributes[count].value.clusterDim =
                sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
            count += 1;
        }
        if hopper && grid.early {
            attributes[count].id =
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as c_uint,
        }
    }

    /// Records what `queue` queues into a graph instead of running it.
    ///
    /// # Errors
    /// What `queue` says, or the driver.
    pub fn record(
        &self,
        queue: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<Graph, DeviceError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(failed("begin a graph"))?;
        let queued = queue();
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        queued?;
        let graph = graph.map_err(failed("make a graph"))?;
        let graph = graph.expect("a capture that was begun ends in a graph");
        graph.upload().map_err(failed("upload a graph"))?;
        Ok(Graph(graph))
    }

    /// Queues a graph.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        graph.0.launch().map_err(failed("launch a graph"))
    }

    /// Queues a mark.
    ///
    /// # Errors
    /// Only when the driver itself fails.
    pub fn mark(&self) -> Result<Mark, DeviceError> {
        let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.stream.record_event(flags).map(Mark).map_err(failed("mark the stream"))
    }

    /// Mean seconds of one call of `queue` by the device's clock, over `repeats` after `warm_up` more.
    ///
    /// # Errors
    /// What `queue` says, or the driver.
    pub fn seconds_each(
        &self,
        warm_up: usize,
        repeats: usize,
        mut queue: impl FnMut(usize) -> Result<(), DeviceError>,
    ) -> Result<f64, DeviceError> {
        (0..warm_up).try_for_each(&mut queue)?;
        let begin = self.mark()?;
        (0..repeats).try_for_each(&mut queue)?;
        let end = self.mark()?;
        Ok(begin.seconds_until(&end)? / repeats as f64)
    }
}

impl Mark {
    /// Waits for the later mark.
    ///
    /// # Errors
    /// What a kernel between them did wrong shows here.
    pub fn seconds_until(&self, later: &Mark) -> Result<f64, DeviceError> {
        let milliseconds = self.0.elapsed_ms(&later.0).map_err(failed("time its work"))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// Waits until the stream has passed it.
    ///
    /// # Errors
    /// What a kernel before it did wrong shows here.
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.0.synchronize().map_err(failed("finish its work"))
    }

    /// Whether the stream has passed it.
    ///
    /// # Errors
    /// What a kernel before it did wrong shows here.
    pub fn is_passed(&self) -> Result<bool, DeviceError> {
        self.0.try_is_complete().map_err(failed("finish its work"))
    }
}

fn no_attribute() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { pad: [0; 64] },
    }
}

fn failed(doing: &'static str) -> impl FnOnce(DriverError) -> DeviceError {
    move |source| DeviceError::Driver { doing, source }
}
