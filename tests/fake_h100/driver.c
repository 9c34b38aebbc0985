/* What PyTorch asks of the CUDA runtime while no kernel is launched: one H100 whose memory is the
   host's. Streams and events are numbers, and all of their work is done. */
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SUCCEEDS(name, ...) cudaError_t CUDARTAPI name(__VA_ARGS__) { return cudaSuccess; }
#define GIVES(name, type, value, ...) \
    cudaError_t CUDARTAPI name(type *out, ##__VA_ARGS__) { *out = (value); return cudaSuccess; }

static uintptr_t handles = 0x1000;
static void *new_handle(void) { return (void *)__atomic_add_fetch(&handles, 16, __ATOMIC_RELAXED); }

/* Pages of the host that copies need not wait for. */
enum { MAX_PINNED = 4096 };
static struct { char *start; size_t size; } pinned[MAX_PINNED];

/* The device. */
GIVES(cudaGetDeviceCount, int, 1)
GIVES(cudaGetDevice, int, 0)
GIVES(cudaDriverGetVersion, int, CUDART_VERSION)
GIVES(cudaRuntimeGetVersion, int, CUDART_VERSION)
GIVES(cudaDeviceCanAccessPeer, int, 0, int device, int peer)
SUCCEEDS(cudaSetDevice, int device)
SUCCEEDS(cudaDeviceSynchronize, void)
SUCCEEDS(cudaGetLastError, void)
SUCCEEDS(cudaPeekAtLastError, void)
const char *CUDARTAPI cudaGetErrorString(cudaError_t error) { return "an error of the fake device"; }
const char *CUDARTAPI cudaGetErrorName(cudaError_t error) { return "cudaErrorOfFakeDevice"; }

cudaError_t CUDARTAPI cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "NVIDIA H100 (fake)");
    properties->totalGlobalMem = (size_t)80 << 30;
    properties->sharedMemPerBlock = 49152;
    properties->regsPerBlock = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = 1024;
    properties->major = 9;
    properties->minor = 0;
    properties->multiProcessorCount = 132;
    properties->maxThreadsPerMultiProcessor = 2048;
    return cudaSuccess;
}

cudaError_t CUDARTAPI cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    default: *value = 1024;
    }
    return cudaSuccess;
}

/* Streams and events. */
cudaError_t CUDARTAPI cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
GIVES(cudaStreamCreateWithPriority, cudaStream_t, new_handle(), unsigned int flags, int priority)
GIVES(cudaEventCreateWithFlags, cudaEvent_t, new_handle(), unsigned int flags)
GIVES(cudaEventElapsedTime, float, 1, cudaEvent_t start, cudaEvent_t end)
SUCCEEDS(cudaStreamDestroy, cudaStream_t stream)
SUCCEEDS(cudaStreamQuery, cudaStream_t stream)
SUCCEEDS(cudaStreamSynchronize, cudaStream_t stream)
SUCCEEDS(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned int flags)
SUCCEEDS(cudaEventDestroy, cudaEvent_t event)
SUCCEEDS(cudaEventQuery, cudaEvent_t event)
SUCCEEDS(cudaEventRecord, cudaEvent_t event, cudaStream_t stream)
SUCCEEDS(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned int flags)
SUCCEEDS(cudaEventSynchronize, cudaEvent_t event)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
cudaError_t CUDARTAPI cudaStreamIsCapturing(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges,
    size_t *num_dependencies) {
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t CUDARTAPI cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

/* Memory. */
GIVES(cudaMalloc, void *, malloc(size), size_t size)
SUCCEEDS(cudaFree, void *memory)
cudaError_t CUDARTAPI cudaMemGetInfo(size_t *available, size_t *total) {
    *available = *total = (size_t)80 << 30;
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemcpy(
    void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    memcpy(target, source, size);
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaMemcpyAsync(
    void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return cudaMemcpy(target, source, size, kind);
}
cudaError_t CUDARTAPI cudaHostAlloc(void **memory, size_t size, unsigned int flags) {
    for (int i = 0; i < MAX_PINNED; ++i)
        if (!pinned[i].start) {
            *memory = pinned[i].start = malloc(size);
            pinned[i].size = size;
            return cudaSuccess;
        }
    return cudaErrorMemoryAllocation;
}
cudaError_t CUDARTAPI cudaFreeHost(void *memory) {
    for (int i = 0; i < MAX_PINNED; ++i)
        if (pinned[i].start == memory) pinned[i].start = NULL;
    free(memory);
    return cudaSuccess;
}
cudaError_t CUDARTAPI cudaPointerGetAttributes(
    struct cudaPointerAttributes *attributes, const void *memory) {
    memset(attributes, 0, sizeof *attributes);
    for (int i = 0; i < MAX_PINNED; ++i)
        if (pinned[i].start && (size_t)((char *)memory - pinned[i].start) < pinned[i].size)
            attributes->type = cudaMemoryTypeHost;
    return cudaSuccess;
}

/* The driver behind it. */
int cuDevicePrimaryCtxGetState(int device, unsigned int *flags, int *is_active) {
    *flags = 0;
    *is_active = 1;
    return 0;
}
static int nothing(void) { return 0; }
cudaError_t CUDARTAPI cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned int version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *status) {
    *function = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing
                                                           : (void *)cuDevicePrimaryCtxGetState;
    if (status) *status = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* What counts devices without waking the driver, so that a process may still be forked. */
int nvmlInit(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = 1;
    return 0;
}
