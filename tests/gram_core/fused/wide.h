// AVX-512 with bfloat16 in 256 bits, for `g++ -include`: what lanes.h asks of it, by the bit but for
// denormal numbers, which AVX-512 takes for zero in bfloat16.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace emulated {
typedef float Floats __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), may_alias));

struct Two {
    __m256 low, high;
};
inline Two two(__m512 x) { return __builtin_bit_cast(Two, x); }
inline __m512 one(__m256 low, __m256 high) { return __builtin_bit_cast(__m512, Two{low, high}); }

// Halves onto halves, in GCC's order.
template <class F>
inline float reduced(__m512 x, F f) {
    const __m256 eight = f(two(x).high, two(x).low);
    __m256 y = f(_mm256_permute2f128_ps(eight, eight, 1), eight);
    y = f(y, _mm256_permute_ps(y, 0b01001110));
    return f(y, _mm256_permute_ps(y, 0b10110001))[0];
}
inline float reduce_add(__m512 x) {
    return reduced(x, [](__m256 a, __m256 b) { return a + b; });
}
inline float reduce_max(__m512 x) {
    return reduced(x, [](__m256 a, __m256 b) { return a > b ? a : b; });
}
// The second number of each pair first; either with one rounding.
inline __m512 dot(__m512 sum, __m512bh a, __m512bh b) {
    const Words x = (Words)a, y = (Words)b, second = Words{} + 0xffff0000u;
    sum += (__m512)(x & second) * (__m512)(y & second);
    return sum + (__m512)(x << 16) * (__m512)(y << 16);
}
inline __m512 all(float pair) { return (__m512)(Words{} + __builtin_bit_cast(uint32_t, pair)); }
// To nearest even; NaN stays one.
inline __m256bh rounded(__m512 x) {
    const Words word = (Words)x, number = (Words)(x == x);
    const Words near = word + 0x7fffu + (word >> 16 & 1u), nan = word | 0x400000u;
    return (__m256bh)__builtin_convertvector(((near & number) | (nan & ~number)) >> 16, Halves);
}
inline __m512i wider(__m256i x) {
    return (__m512i)__builtin_convertvector((Halves)x, Words);
}
inline __m512i shifted(__m512i x, int bits) { return (__m512i)((Words)x << bits); }
inline __m512i either(__m512i x, __m512i y) { return x | y; }
inline __m512 whole(__m512 x, int) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return one(_mm256_round_ps(two(x).low, nearest), _mm256_round_ps(two(x).high, nearest));
}
// p * 2^n, where 2^n is a normal number.
inline __m512 scaled(__m512 p, __m512 n) {
    auto power = [](__m256 n) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
    };
    return p * one(power(two(n).low), power(two(n).high));
}
inline __m512 first(__m128 x) { return one(_mm256_castps128_ps256(x), __m256{}); }
// A quarter of x, named by the bits of its numbers, becomes `four`.
inline __m512 quarter(__m512 x, int numbers, __m128 four) {
    const Two y = two(x);
    switch (numbers) {
        case 0x00f0: return one(_mm256_insertf128_ps(y.low, four, 1), y.high);
        case 0x0f00: return one(y.low, _mm256_insertf128_ps(y.high, four, 0));
        default: return one(y.low, _mm256_insertf128_ps(y.high, four, 1));
    }
}
}  // namespace emulated

#define __AVX512F__ 1
#define __AVX512BF16__ 1
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_dpbf16_ps emulated::dot
#define _mm512_set1_ps emulated::all
#define _mm512_cvtneps_pbh emulated::rounded
#define _mm512_cvtepu16_epi32 emulated::wider
#define _mm512_slli_epi32 emulated::shifted
#define _mm512_or_si512 emulated::either
#define _mm512_roundscale_ps emulated::whole
#define _mm512_scalef_ps emulated::scaled
#define _mm512_castps128_ps512 emulated::first
#define _mm512_mask_broadcast_f32x4 emulated::quarter
