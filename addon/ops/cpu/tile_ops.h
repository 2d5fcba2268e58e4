// The AMX instructions that the kernels use, by the number of a tile. With RODIN_EMULATED_TILES they are
// functions that give the same bits by AVX-512, for tests on machines without AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace rodin {
namespace {

constexpr int64_t kTileInputs = 32;
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};  // [8 tiles, 8 unused]
  uint8_t rows[16] = {};        // [8 tiles, 8 unused]
};
static_assert(sizeof(TileConfig) == 64);

// Denormal sums and inputs are zero while one of these lives, as they are to tdpbf16ps.
class DenormalsAreZero {
 public:
  DenormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~DenormalsAreZero() { _mm_setcsr(before_); }
  DenormalsAreZero(const DenormalsAreZero&) = delete;
  DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

 private:
  const unsigned before_;
};

#ifdef RODIN_EMULATED_TILES

struct EmulatedTiles {
  TileConfig config;
  alignas(64) char data[8][kTileRows][64];  // [8 tiles, rows, bytes]
};
thread_local EmulatedTiles emulated_tiles;

inline void emulated_config(const TileConfig* config) {
  emulated_tiles.config = *config;
  memset(emulated_tiles.data, 0, sizeof emulated_tiles.data);
}
inline void emulated_zero(int tile) { memset(emulated_tiles.data[tile], 0, kTileBytes); }
inline void emulated_load(int tile, const void* from, int64_t stride) {
  emulated_zero(tile);
  for (int row = 0; row < emulated_tiles.config.rows[tile]; ++row) {
    memcpy(emulated_tiles.data[tile][row], static_cast<const char*>(from) + row * stride, 64);
  }
}
inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < emulated_tiles.config.rows[tile]; ++row) {
    memcpy(static_cast<char*>(to) + row * stride, emulated_tiles.data[tile][row], 64);
  }
}
// Even and odd inputs are summed apart, then together, then onto what was there.
[[gnu::noinline]] void emulated_multiply(int sum, int a, int b) {
  const DenormalsAreZero mode;
  for (int row = 0; row < emulated_tiles.config.rows[sum]; ++row) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < kTileRows; ++k) {
      uint32_t pair;
      memcpy(&pair, emulated_tiles.data[a][row] + 4 * k, 4);
      const __m512i by = _mm512_load_si512(emulated_tiles.data[b][k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair << 16))),
                             _mm512_castsi512_ps(_mm512_slli_epi32(by, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair & 0xffff0000))),
                            _mm512_castsi512_ps(_mm512_and_si512(by, _mm512_set1_epi32(-65536))), odd);
    }
    void* to = emulated_tiles.data[sum][row];
    _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_add_ps(even, odd)));
  }
}

#define TILE_CONFIG(config) emulated_config(config)
#define TILE_RELEASE() static_cast<void>(0)
#define TILE_ZERO(tile) emulated_zero(tile)
#define TILE_LOAD(tile, from, stride) emulated_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulated_store(tile, to, stride)
#define TILE_MULTIPLY(sum, a, b) emulated_multiply(sum, a, b)

#else

// The compiler takes a tile's load for one that reads no memory: where what is loaded was stored in the same
// function, TILE_FENCE comes between.
#define TILE_CONFIG(config) _tile_loadconfig(config)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(tile) _tile_zero(tile)
#define TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_MULTIPLY(sum, a, b) _tile_dpbf16ps(sum, a, b)

#endif

#define TILE_FENCE() asm volatile("" ::: "memory")

}  // namespace
}  // namespace rodin
