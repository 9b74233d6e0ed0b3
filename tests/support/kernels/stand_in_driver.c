// A libcuda.so.1 without a device: it runs nothing and keeps what it is asked to launch.
#include <stdint.h>
#include <string.h>
#include <cuda.h>

#define MAX_RECORDS 4096
#define MAX_BYTES 4096
#define EXPORT __attribute__((visibility("default")))

typedef struct {
  uint64_t function, stream;
  uint32_t grid[3], block, shared, size;
  uint8_t bytes[MAX_BYTES];
} Record;

static Record records[MAX_RECORDS];
static int count;
static uint64_t functions;
// Sizes of the parameters of each function; unknown until someone says.
static uint32_t sizes[1024][64], parameters[1024];

EXPORT int stand_in_count(void) { return count; }
EXPORT void stand_in_clear(void) { count = 0; }
EXPORT const Record *stand_in_record(int index) { return &records[index]; }
EXPORT void stand_in_parameters(uint64_t function, uint32_t number, const uint32_t *bytes) {
  parameters[function] = number;
  memcpy(sizes[function], bytes, number * sizeof(uint32_t));
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments,
                                 void **extra) {
  Record *record = &records[count++ % MAX_RECORDS];
  uint64_t function = (uint64_t)f;
  record->function = function;
  record->stream = (uint64_t)config->hStream;
  record->grid[0] = config->gridDimX;
  record->grid[1] = config->gridDimY;
  record->grid[2] = config->gridDimZ;
  record->block = config->blockDimX;
  record->shared = config->sharedMemBytes;
  record->size = 0;
  for (uint32_t i = 0; i < parameters[function]; i++) {
    memcpy(record->bytes + record->size, arguments[i], sizes[function][i]);
    record->size += sizes[function][i];
  }
  return CUDA_SUCCESS;
}

// The map is what it was made from.
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                       void *address, const cuuint64_t *shape,
                                       const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
  uint64_t *words = (uint64_t *)map;
  memset(map, 0, sizeof(*map));
  words[0] = (uint64_t)address;
  words[1] = (uint64_t)type | (uint64_t)rank << 16 | (uint64_t)swizzle << 32 | (uint64_t)fill << 48;
  for (cuuint32_t i = 0; i < rank && i < 3; i++) {
    words[2 + i] = shape[i];
    words[5 + i] = i + 1 < rank ? strides[i] : 0;
    words[8 + i] = box[i];
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = 13020; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int *number) { *number = 1; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(++functions);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
EXPORT CUresult cuOccupancyMaxActiveClusters(int *number, CUfunction f, const CUlaunchConfig *c) {
  *number = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "an error of the stand-in driver";
  return CUDA_SUCCESS;
}
// Any address is one of the device.
EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr p) {
  *(CUdeviceptr *)data = p;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttributes(unsigned number, CUpointer_attribute *attributes,
                                       void **data, CUdeviceptr p) {
  for (unsigned i = 0; i < number; i++) *(CUdeviceptr *)data[i] = p;
  return CUDA_SUCCESS;
}
