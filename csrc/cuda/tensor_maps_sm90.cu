// How TMA sees hidden states and weights.
#include "sm90.h"

namespace g2rl::cuda::sm90 {

#ifdef __CUDACC__
// The encoder is the driver's; asking the runtime for it spares linking with libcuda.
int make_tensor_map(TensorMap& map, const void* base, Dtype dtype, int64_t rows, int64_t columns, int64_t stride,
                    int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? Encode(found) : nullptr;
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {kColumns, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const auto type = dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto error =
      encode(&map, type, 2, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? 0 : cudaErrorInvalidValue;
}
#else
// Refuses what the driver does.
int make_tensor_map(TensorMap& map, const void* base, Dtype, int64_t rows, int64_t columns, int64_t stride,
                    int box_rows) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
  const bool sized = rows > 0 && columns > 0 && stride >= columns && stride < int64_t(1) << 39;
  if (!aligned || !sized || box_rows <= 0 || box_rows > 256) return 1;
  map = {static_cast<const uint8_t*>(base), rows, columns, 2 * stride, box_rows};
  return 0;
}
#endif

bool serves(const Head& head, const Tokens& tokens) {
  const auto aligned = [](const void* base, int64_t stride, int columns) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0 && stride >= columns;
  };
  return head.dtype != Dtype::fp32 && aligned(head.weight, head.stride, head.d) &&
         aligned(tokens.hidden, tokens.stride, head.d);
}

}  // namespace g2rl::cuda::sm90
