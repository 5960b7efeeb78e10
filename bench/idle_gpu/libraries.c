/* cuBLAS, cuDNN and NCCL for the device that computes nothing: those of their functions that hand something back.
 *
 * The others return 0 and are made by build.py. Handles and descriptors are memory that nobody reads. Workspaces have
 * no bytes: what the true libraries would ask for, beside cuBLAS's own that PyTorch allocates, is not counted.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* CUDNN_FMA_MATH: the one kind of arithmetic that PyTorch accepts whatever it allows. */
enum { ENOUGH = 4096, FMA_MATH = 3 };

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

/* ---- cuDNN, its interface of version 7 (TORCH_CUDNN_V8_API_DISABLED) ---- */

/* Old enough for PyTorch to take its own flash attention, which is a kernel like any other. */
size_t cudnnGetVersion(void) { return 91000; }
size_t cudnnGetCudartVersion(void) { return 13000; }
int cudnnGetProperty(int which, int *value) { return *value = which == 0 ? 9 : which == 1 ? 10 : 0, 0; }
const char *cudnnGetErrorString(int error) { return "an error of the device that computes nothing"; }
int cudnnCreate(void **made) { return make(made); }
int cudnnCreateActivationDescriptor(void **made) { return make(made); }
int cudnnCreateConvolutionDescriptor(void **made) { return make(made); }
int cudnnCreateDropoutDescriptor(void **made) { return make(made); }
int cudnnCreateFilterDescriptor(void **made) { return make(made); }
int cudnnCreatePoolingDescriptor(void **made) { return make(made); }
int cudnnCreateTensorDescriptor(void **made) { return make(made); }

/* cudnnConvolution...AlgoPerf_t */
typedef struct {
  int algorithm, status;
  float time;
  size_t workspace;
  int determinism, math, reserved[3];
} Choice;

static int choose(int *found, Choice *choice) {
  memset(choice, 0, sizeof *choice);
  choice->algorithm = choice->determinism = 1;
  choice->math = FMA_MATH;
  *found = 1;
  return 0;
}
int cudnnGetConvolutionForwardAlgorithm_v7(void *h, void *x, void *w, void *c, void *y, int asked, int *n, Choice *p) {
  return choose(n, p);
}
int cudnnGetConvolutionBackwardDataAlgorithm_v7(void *h, void *w, void *dy, void *c, void *dx, int asked, int *n,
                                                Choice *p) {
  return choose(n, p);
}
int cudnnGetConvolutionBackwardFilterAlgorithm_v7(void *h, void *x, void *dy, void *c, void *dw, int asked, int *n,
                                                  Choice *p) {
  return choose(n, p);
}
int cudnnGetConvolutionForwardWorkspaceSize(void *h, void *x, void *w, void *c, void *y, int a, size_t *bytes) {
  return nothing(bytes);
}
int cudnnGetConvolutionBackwardDataWorkspaceSize(void *h, void *w, void *dy, void *c, void *dx, int a, size_t *bytes) {
  return nothing(bytes);
}
int cudnnGetConvolutionBackwardFilterWorkspaceSize(void *h, void *x, void *dy, void *c, void *dw, int a, size_t *bytes) {
  return nothing(bytes);
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
