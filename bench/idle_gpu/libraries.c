/* cuBLAS, cuDNN and NCCL for the device that computes nothing: those of their functions that hand something back.
 *
 * The others return 0 and are made by build.py. Handles and descriptors are memory that nobody reads. Workspaces have
 * no bytes: what the true libraries would ask for, beside cuBLAS's own that PyTorch allocates, is not counted.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { ENOUGH = 4096 };

static int make(void **made) {
  *made = calloc(1, ENOUGH);
  return 0;
}
static int nothing(size_t *bytes) {
  *bytes = 0;
  return 0;
}

/* ---- cuBLAS ---- */

int cublasCreate_v2(void **handle) { return make(handle); }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
size_t cublasLtGetVersion(void) { return 130200; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return make(made); }
int cublasLtMatmulDescDestroy(void *made) { return free(made), 0; }
int cublasLtMatmulPreferenceCreate(void **made) { return make(made); }
int cublasLtMatmulPreferenceDestroy(void *made) { return free(made), 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long rows, unsigned long columns, long stride) {
  return make(made);
}
int cublasLtMatrixLayoutDestroy(void *made) { return free(made), 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int asked, void *results, int *found) {
  memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: no workspace, success */
  *found = 1;
  return 0;
}

/* ---- cuDNN ---- */

/* Old enough for PyTorch to take its own flash attention, which is a kernel like any other. */
size_t cudnnGetVersion(void) { return 91000; }
size_t cudnnGetCudartVersion(void) { return 13000; }
int cudnnGetProperty(int which, int *value) { return *value = which == 0 ? 9 : which == 1 ? 10 : 0, 0; }
const char *cudnnGetErrorString(int error) { return "an error of the device that computes nothing"; }
int cudnnCreate(void **made) { return make(made); }
int cudnnCreateDropoutDescriptor(void **made) { return make(made); }
int cudnnCreateFilterDescriptor(void **made) { return make(made); }
int cudnnCreateTensorDescriptor(void **made) { return make(made); }

int cudnnBackendCreateDescriptor(int type, void **made) { return make(made); }
int cudnnBackendDestroyDescriptor(void *made) { return free(made), 0; }
/* A plan for a convolution has one of everything, no notes about its numbers, and needs no workspace. */
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long asked, long *found, void *values) {
  enum { INT64 = 3, NUMERICAL_NOTE = 11, BEHAVIOR_NOTE = 19 };
  if (found) *found = type != NUMERICAL_NOTE && type != BEHAVIOR_NOTE;
  if (values && asked && type == INT64) *(long *)values = 0;
  return 0;
}

int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *h, int m, int o, void *x, void *z, void *y, void *b,
                                                             void *a, size_t *bytes) {
  return nothing(bytes);
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *h, int m, int o, void *x, void *y, void *dy, void *dz,
                                                      void *dx, void *b, void *a, size_t *bytes) {
  return nothing(bytes);
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *h, int m, int o, void *a, void *x, size_t *bytes) {
  return nothing(bytes);
}

/* ---- NCCL, with one process ---- */

typedef struct {
  char bytes[128];
} UniqueId;

int ncclGetVersion(int *version) { return *version = 22800, 0; }
int ncclGetUniqueId(UniqueId *id) { return memset(id, 0, sizeof *id), 0; }
int ncclCommInitRank(void **made, int size, UniqueId id, int rank) { return make(made); }
int ncclCommInitRankConfig(void **made, int size, UniqueId id, int rank, void *config) { return make(made); }
int ncclCommInitRankScalable(void **made, int size, int rank, int n, UniqueId *ids, void *config) { return make(made); }
int ncclCommSplit(void *from, int color, int key, void **made, void *config) { return make(made); }
int ncclCommRegister(void *comm, void *buffer, size_t bytes, void **made) { return make(made); }
int ncclCommGetAsyncError(void *comm, int *error) { return *error = 0; }
int ncclCommCount(void *comm, int *n) { return *n = 1, 0; }
int ncclCommUserRank(void *comm, int *rank) { return *rank = 0; }
const char *ncclGetErrorString(int error) { return "an error of the device that computes nothing"; }
const char *ncclGetLastError(void *comm) { return ""; }
int cudaMalloc(void **address, size_t bytes);
int ncclMemAlloc(void **address, size_t bytes) { return cudaMalloc(address, bytes); }
