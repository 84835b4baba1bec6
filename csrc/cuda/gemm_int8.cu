// gemm_int8.cu - w8a8 and w8a16: which kernel and which tiles serve which numbers of rows (measured, bench/RESULTS.md).
#include "cuda/gemm_few_rows.cuh"
#include "cuda/gemm_many_rows.cuh"

namespace lepton::cuda {
namespace {

template <class Format>
cudaError_t by_rows(const GemmArgs& args, cudaStream_t stream) {
  if (args.m <= kSliceRows) return launch<Format, 2, 1, 8, 2>(args, stream);
  return launch<Format, 2, 2, 8, 1>(args, stream);
}

}  // namespace

cudaError_t gemm_int8(const GemmArgs& args, cudaStream_t stream) {
  if (args.row_scale) return by_rows<W8A8>(args, stream);
  if (args.m > kMostFewRows)
    return args.dtype == Dtype::f16 ? launch_many_rows<WideInt8<__half>>(args, stream)
                                    : launch_many_rows<WideInt8<__nv_bfloat16>>(args, stream);
  return args.dtype == Dtype::f16 ? by_rows<W8A16<__half>>(args, stream) : by_rows<W8A16<__nv_bfloat16>>(args, stream);
}

}  // namespace lepton::cuda
