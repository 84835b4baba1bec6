// gemm_int4.cu - w4a16: which kernel and which tiles serve which numbers of rows (measured, bench/RESULTS.md).
#include "cuda/gemm_few_rows.cuh"
#include "cuda/gemm_many_rows.cuh"

namespace lepton::cuda {
namespace {

template <class T>
cudaError_t by_rows(const GemmArgs& args, cudaStream_t stream) {
  if (args.m <= kSliceRows) return launch<W4A16<T>, 2, 1, 8, 2>(args, stream);
  return launch<W4A16<T>, 4, 2, 8, 1>(args, stream);
}

}  // namespace

cudaError_t gemm_int4(const GemmArgs& args, cudaStream_t stream) {
  if (args.m > kMostFewRows && args.dtype == Dtype::bf16) return launch_many_rows<WideInt4>(args, stream);
  return args.dtype == Dtype::f16 ? by_rows<__half>(args, stream) : by_rows<__nv_bfloat16>(args, stream);
}

}  // namespace lepton::cuda
