/* huff0.c - zstd's Huffman coder by itself, in blocks of 128 KiB as zstd has them. Compiled by rivals_codec.py together with the
 * zstd.c of the package `zstandard`, whose functions of this coder are not public.
 *
 * A block: uint32 of its coded bytes, which is 0 for bytes left as they are, 1 for one repeated byte.
 */
#include "zstd.c"

enum { kBlock = 128 * 1024, kSymbols = 255, kTableLog = 11 };

static int flags(void) {
  ZSTD_cpuid_t const cpu = ZSTD_cpuid();
  return ZSTD_cpuid_bmi2(cpu) ? HUF_flags_bmi2 : 0;
}

/* Returns the bytes written; dst has room for size + 4 bytes a block. */
size_t huff0_encode(const unsigned char* src, size_t size, unsigned char* dst) {
  static _Thread_local unsigned long long workspace[HUF_WORKSPACE_SIZE / 8 + 1];
  unsigned char* out = dst;
  for (size_t at = 0; at < size; at += kBlock) {
    size_t const n = size - at < kBlock ? size - at : kBlock;
    HUF_repeat repeat = HUF_repeat_none;
    HUF_CElt table[HUF_CTABLE_SIZE_ST(kSymbols)];
    size_t coded = HUF_compress4X_repeat(out + 4, n, src + at, n, kSymbols, kTableLog, workspace, sizeof workspace, table,
                                         &repeat, flags());
    if (HUF_isError(coded) || coded >= n) coded = 0;
    MEM_writeLE32(out, (U32)coded);
    if (coded == 0) memcpy(out + 4, src + at, n);
    out += 4 + (coded == 0 ? n : coded);
  }
  return (size_t)(out - dst);
}

/* symbols: 1 or 2 a look-up (huff0's X1 and X2). Returns 0, or 1 for damaged data. */
int huff0_decode(const unsigned char* src, size_t src_size, unsigned char* dst, size_t size, int symbols) {
  static _Thread_local unsigned workspace[HUF_DECOMPRESS_WORKSPACE_SIZE_U32];
  const unsigned char* const end = src + src_size;
  for (size_t at = 0; at < size; at += kBlock) {
    size_t const n = size - at < kBlock ? size - at : kBlock;
    if (end - src < 4) return 1;
    size_t const coded = MEM_readLE32(src);
    src += 4;
    if ((size_t)(end - src) < (coded == 0 ? n : coded)) return 1;
    if (coded <= 1) {
      if (coded == 0) memcpy(dst + at, src, n); else memset(dst + at, *src, n);
    } else if (symbols == 1) {
      HUF_CREATE_STATIC_DTABLEX1(table, HUF_TABLELOG_MAX);
      if (HUF_decompress4X1_DCtx_wksp(table, dst + at, n, src, coded, workspace, sizeof workspace, flags()) != n) return 1;
    } else {
      HUF_CREATE_STATIC_DTABLEX2(table, HUF_TABLELOG_MAX);
      if (HUF_decompress4X2_DCtx_wksp(table, dst + at, n, src, coded, workspace, sizeof workspace, flags()) != n) return 1;
    }
    src += coded == 0 ? n : coded;
  }
  return src != end;
}
