/* A CUDA device that computes nothing: the runtime and the driver, as far as PyTorch and Triton call them.
 *
 * Kernels are counted and not run. Memory of the device is address space of this process that becomes real when it is
 * written, so that 140 GiB of it fit anywhere; it holds what the host copied there, else zeros or what was there
 * before. Copies within the device, and fills, are kernels in all but name and not done either. Streams are always
 * idle, events tell the time of the host.
 *
 * The figures of the device are those of an H200.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

/* Memory of the device; the environment's IDLE_GPU_MB asks for another size. */
static size_t total_bytes = (size_t)143771 << 20;
#define MAX_REGIONS 65536
#define PAGE ((size_t)4096)

__attribute__((constructor)) static void settle(void) {
  const char *megabytes = getenv("IDLE_GPU_MB");
  size_t asked = megabytes ? strtoull(megabytes, NULL, 10) : 0;
  if (asked) total_bytes = asked << 20;
}

/* ---- memory ---- */

static struct {
  char *start;
  size_t bytes;
  int on_device;
} regions[MAX_REGIONS];
static int num_regions;
static size_t device_bytes;
static cudaError_t last_error;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Index of the region that holds an address, or -1; under the lock. */
static int region_of(const void *address) {
  const char *at = address;
  for (int i = num_regions - 1; i >= 0; i--)
    if (at >= regions[i].start && at < regions[i].start + regions[i].bytes) return i;
  return -1;
}

static cudaError_t allocate(void **address, size_t bytes, int on_device) {
  cudaError_t error = cudaSuccess;
  *address = NULL;
  bytes = (bytes + PAGE - 1) & ~(PAGE - 1);
  if (!bytes) return cudaSuccess;
  pthread_mutex_lock(&lock);
  if (num_regions == MAX_REGIONS || (on_device && device_bytes + bytes > total_bytes)) {
    error = cudaErrorMemoryAllocation;
  } else {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
      error = cudaErrorMemoryAllocation;
    } else {
      regions[num_regions].start = at;
      regions[num_regions].bytes = bytes;
      regions[num_regions++].on_device = on_device;
      if (on_device) device_bytes += bytes;
      *address = at;
    }
  }
  if (error) last_error = error;
  pthread_mutex_unlock(&lock);
  return error;
}

static cudaError_t release(void *address) {
  pthread_mutex_lock(&lock);
  int i = address ? region_of(address) : -1;
  if (i >= 0) {
    munmap(regions[i].start, regions[i].bytes);
    if (regions[i].on_device) device_bytes -= regions[i].bytes;
    regions[i] = regions[--num_regions];
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t bytes) {
  pthread_mutex_lock(&lock);
  int a = region_of(to), b = region_of(from);
  int within = a >= 0 && b >= 0 && regions[a].on_device && regions[b].on_device;
  pthread_mutex_unlock(&lock);
  if (!within) memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **p, size_t n) { return allocate(p, n, 1); }
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return allocate(p, n, 1); }
cudaError_t cudaMallocHost(void **p, size_t n) { return allocate(p, n, 0); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) { return allocate(p, n, 0); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return release(p); }
cudaError_t cudaFreeHost(void *p) { return release(p); }

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { return copy(to, from, n); }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  return copy(to, from, n);
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *unused = total_bytes - device_bytes;
  *total = total_bytes;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  int i = region_of(p);
  if (i >= 0) {
    found->type = regions[i].on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    found->devicePointer = (void *)p;
    found->hostPointer = regions[i].on_device ? NULL : (void *)p;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  static char space[1 << 20];
  *p = space;
  return cudaSuccess;
}

/* ---- kernels ---- */

static atomic_ulong launches;

/* Since the process began. */
unsigned long idle_gpu_launches(void) { return launches; }

/* For the functions of cuBLAS and cuDNN that would launch one. */
void idle_gpu_launch(void) { launches++; }

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
  launches++;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **arguments) {
  launches++;
  return cudaSuccess;
}
/* What `kernel<<<...>>>()` begins with; anything but 0 has it leave the kernel out. */
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  launches++;
  return 1;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **arguments, void **extra) {
  launches++;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments, void **extra) {
  launches++;
  return CUDA_SUCCESS;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
  f(data);
  return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[1];
  return handle;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *f) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->maxDynamicSharedSizeBytes = 49152;
  found->ptxVersion = found->binaryVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int threads, size_t shared) {
  *n = 8;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int threads, size_t shared,
                                                                   unsigned flags) {
  *n = 8;
  return cudaSuccess;
}

/* ---- streams and events ---- */

/* A handle that differs from all others; never given back. */
static void *handle(void) { return calloc(1, 64); }

cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return *s = handle(), cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) { return *s = handle(), cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = handle(), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
  clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned f) { return cudaEventRecord(event, s); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
  const struct timespec *a = (void *)from, *b = (void *)to;
  *ms = (b->tv_sec - a->tv_sec) * 1e3f + (b->tv_nsec - a->tv_nsec) / 1e6f;
  return cudaSuccess;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return last_error = device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:00:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 that computes nothing");
  memcpy(p->uuid.bytes, "computes nothing", 16);
  p->totalGlobalMem = total_bytes;
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->reservedSharedMemPerBlock = 1024;
  p->l2CacheSize = 62914560;
  p->memoryBusWidth = 6144;
  p->totalConstMem = 65536;
  p->memPitch = 2147483647;
  p->textureAlignment = 512;
  p->texturePitchAlignment = 32;
  p->asyncEngineCount = 3;
  p->canMapHostMemory = p->concurrentKernels = p->ECCEnabled = p->unifiedAddressing = 1;
  p->streamPrioritiesSupported = p->managedMemory = p->cooperativeLaunch = p->hostRegisterSupported = 1;
  p->memoryPoolsSupported = p->clusterLaunch = 1;
  return cudaSuccess;
}

/* CUdevice_attribute has the same numbers. */
static int attribute(int which) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return p.major;
    case cudaDevAttrMultiProcessorCount: return p.multiProcessorCount;
    case cudaDevAttrWarpSize: return p.warpSize;
    case cudaDevAttrMaxThreadsPerBlock: return p.maxThreadsPerBlock;
    case cudaDevAttrMaxBlockDimX: return p.maxThreadsDim[0];
    case cudaDevAttrMaxBlockDimY: return p.maxThreadsDim[1];
    case cudaDevAttrMaxBlockDimZ: return p.maxThreadsDim[2];
    case cudaDevAttrMaxGridDimX: return p.maxGridSize[0];
    case cudaDevAttrMaxGridDimY: return p.maxGridSize[1];
    case cudaDevAttrMaxGridDimZ: return p.maxGridSize[2];
    case cudaDevAttrMaxThreadsPerMultiProcessor: return p.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return p.maxBlocksPerMultiProcessor;
    case cudaDevAttrMaxRegistersPerBlock: return p.regsPerBlock;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return p.regsPerMultiprocessor;
    case cudaDevAttrMaxSharedMemoryPerBlock: return p.sharedMemPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return p.sharedMemPerBlockOptin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return p.sharedMemPerMultiprocessor;
    case cudaDevAttrL2CacheSize: return p.l2CacheSize;
    case cudaDevAttrGlobalMemoryBusWidth: return p.memoryBusWidth;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrUnifiedAddressing: return p.unifiedAddressing;
    case cudaDevAttrStreamPrioritiesSupported: return p.streamPrioritiesSupported;
    case cudaDevAttrCooperativeLaunch: return p.cooperativeLaunch;
    default: return 0;
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }
const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the device that computes nothing";
}

/* ---- the driver ---- */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDART_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *n) { return *n = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}
static char context;
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice d) { return *found = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *found) { return *found = (CUcontext)&context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { return *value = 0, CUDA_SUCCESS; }
CUresult cuModuleLoad(CUmodule *module, const char *file) { return *module = handle(), CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = handle(), CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
  return *module = handle(), CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) { return *f = handle(), CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int threads, size_t shared) {
  return *n = 8, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { return *n = 8, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status) { return *status = 0, CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr *)value = p;
  else
    *(int *)value = 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the device that computes nothing";
  return CUDA_SUCCESS;
}

/* c10 asks for functions of the driver by name. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  *f = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *f ? cudaSuccess : cudaErrorSymbolNotFound;
}
