// Softmax attention with rotary positions of queries and keys, one head at a time: forward and
// backward.
//
// A head's queries, keys and values fit the processor's caches. All that lies between a head's
// numbers in qkv and its numbers in out (the rotation, the scores, the softmax) stays there.
//
// L positions, LP of them with whole vectors of keys, LQ with whole tiles of queries; C channels of
// a head, U lanes of them, UP with whole vectors. What pads q, k and v is zero.
#pragma once

#include "lanes.h"

namespace {

// f of a head's width as a constant, or `none` where it is not one that is compiled for.
template <class None, class F>
None of_channels(long channels, None none, F f) {
    switch (channels) {
        case 16: return f(std::integral_constant<int, 16>());
        case 32: return f(std::integral_constant<int, 32>());
        case 64: return f(std::integral_constant<int, 64>());
        case 128: return f(std::integral_constant<int, 128>());
    }
    return none;
}

// The rotary embedding of scale * x at one position, halves paired; with sign -1 its transpose.
template <class From, class To, int C>
inline void rotate(const typename From::Number* x, const float* cos, const float* sin, float sign,
                   float scale, typename To::Number* out) {
    constexpr int E = C / 2;
    if constexpr (E >= W) {
        for (int e = 0; e < E; e += W) {
            const Lanes a = From::get(x + e) * scale, b = From::get(x + E + e) * scale;
            const Lanes c = load(cos + e), s = load(sin + e) * sign;
            To::put(out + e, a * c - b * s);
            To::put(out + E + e, b * c + a * s);
        }
    } else {  // both halves in one vector
        const Lanes a = From::get(x) * scale;
        Lanes c, s;
        Words other;
        for (int l = 0; l < W; l++) {
            c[l] = cos[l % E];
            s[l] = l < E ? -sign * sin[l % E] : sign * sin[l % E];
            other[l] = (l + E) % W;
        }
        To::put(out, a * c + __builtin_shuffle(a, other) * s);
    }
}

// One head: buffers that are used for one after the other.
template <class T, int C>
struct Head {
    using Number = typename T::Number;
    static constexpr int N = T::IN_LANE, E = C / 2, U = C / N, UP = padded(U, W);
    const long L, LQ, LP, stride, width;  // numbers from row to row of qkv, and of out
    const float *cos, *sin;
    Buffer q, k, kt, v, s, p;
    float inverse[ROWS];

    Head(long length, long heads, const float* table)
        : L(length), LQ(padded(L, ROWS)), LP(padded(L, W)), stride(3 * heads * C),
          width(heads * C), cos(table), sin(table + L * E), q(LQ * UP), k(LP * UP), kt(UP * LP),
          v(LP * UP * N), s(ROWS * LP), p(N == 1 ? 0 : ROWS * LP) {}

    static Number* numbers(float* p) { return reinterpret_cast<Number*>(p); }
    static const Number* numbers(const float* p) { return reinterpret_cast<const Number*>(p); }

    // [LP, UP] -> [UP, LP]
    void transposed(const Buffer& in, Buffer& out) const {
        for (long j = 0; j < LP; j += W)
            for (int u = 0; u < UP; u += W)
                transpose(in.data() + j * UP + u, UP, out.data() + u * LP + j, LP);
    }

    // L rows of C numbers, as a product that sums over rows reads them.
    void by_rows(const Number* in, long in_width, Buffer& out) const {
        for (long j = 0; j < L; j += 2) {
            const Number* row = in + j * in_width;
            for (int c = 0; c < C; c += W) {
                const Lanes second = j + 1 < L ? T::get(row + in_width + c) : Lanes{};
                T::put_rows(out.data() + j / N * C + c, C, T::get(row + c), second);
            }
        }
    }

    // Rotated queries and keys, and the keys transposed. Scores are powers of two: q has the factor.
    void read(const Number* in) {
        const float scale = 1.4426950408889634f / std::sqrt(float(C));
        for (long j = 0; j < L; j++) {
            const Number* row = in + j * stride;
            rotate<T, T, C>(row, cos + j * E, sin + j * E, 1, scale, numbers(&q[j * UP]));
            rotate<T, T, C>(row + width, cos + j * E, sin + j * E, 1, 1, numbers(&k[j * UP]));
        }
        transposed(k, kt);
    }

    // exp(score - the largest of its row) of the queries from i on, into s, and one over its sums.
    // In steps over all rows, that no row waits for its own maximum and sum.
    void weigh(long i) {
        stripe<T>(&q[i * UP], UP, 1, in_rows(kt.data(), U, LP),
                   [&](long r, long j, Lanes x) { store(&s[r * LP + j], x); });
        Lanes most[ROWS], sum[ROWS];
        float top[ROWS];
        for (int r = 0; r < ROWS; r++) {
            float* row = &s[r * LP];
            for (long j = L; j < LP; j++) row[j] = -std::numeric_limits<float>::infinity();
            most[r] = load(row);
            for (long j = W; j < LP; j += W) {
                const Lanes x = load(row + j);
                most[r] = x > most[r] ? x : most[r];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) top[r] = largest(most[r]);
        for (int r = 0; r < ROWS; r++) {
            float* row = &s[r * LP];
            sum[r] = Lanes{};
#pragma GCC unroll 4
            for (long j = 0; j < LP; j += W) {
                const Lanes weight = power_of_two(load(row + j) - top[r]);
                sum[r] += weight;
                store(row + j, weight);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) inverse[r] = 1 / total(sum[r]);
    }

    void forward(const Number* in, Number* out) {
        read(in);
        const Number* values = in + 2 * width;
        if (N == 2) by_rows(values, stride, v);
        const Right by_v = N == 1 ? Right{reinterpret_cast<const float*>(values), L, C, stride}
                                  : in_rows(v.data(), LP / N, C);
        for (long i = 0; i < L; i += ROWS) {
            weigh(i);
            if constexpr (N == 2)
                for (int r = 0; r < ROWS; r++)
                    for (long j = 0; j < LP; j += W)
                        T::put(numbers(&p[r * LP]) + j, load(&s[r * LP + j]));
            stripe<T>(N == 1 ? s.data() : p.data(), LP, 1, by_v,
                       [&](long r, long c, Lanes x) {
                           if (i + r < L) T::put(out + (i + r) * width + c, x * inverse[r]);
                       });
        }
    }
};

// With S = Q K^T and P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - sum of P dP over keys),
// dQ = dS K, dK = dS^T Q. P is computed again, which is cheaper than to keep and read it.
template <class T, int C>
struct Gradient : Head<T, C> {
    using Base = Head<T, C>;
    using typename Base::Number;
    using Base::cos, Base::inverse, Base::k, Base::L, Base::LP, Base::LQ, Base::N, Base::numbers,
        Base::p, Base::q, Base::s, Base::sin, Base::stride, Base::U, Base::UP, Base::v, Base::width,
        Base::E;
    Buffer g, g_rows, q_rows, k_rows, vt, dp, p_rows, ds_rows;

    // Copies by rows are of bfloat16. ROWS more at the end of those that are read as columns, tile by
    // tile.
    Gradient(long length, long heads, const float* table)
        : Base(length, heads, table), g(LQ * UP), g_rows((N - 1) * LQ * C),
          q_rows((N - 1) * LQ * C), k_rows((N - 1) * LP * C), vt(UP * LP), dp(ROWS * LP),
          p_rows(LQ / N * LP + ROWS), ds_rows(LQ / N * LP + ROWS) {}

    void backward(const Number* in, const Number* grad, Number* out) {
        Base::read(in);
        for (long j = 0; j < L; j++) {
            memcpy(&g[j * UP], grad + j * width, C * sizeof(Number));
            memcpy(&v[j * UP], in + j * stride + 2 * width, C * sizeof(Number));
        }
        Base::transposed(v, vt);
        const Right by_g = summed_over(g, g_rows, LQ), by_q = summed_over(q, q_rows, LQ),
                    by_k = summed_over(k, k_rows, LP);
        const float scale = 1 / std::sqrt(float(C));
        for (long i = 0; i < L; i += ROWS) {
            Base::weigh(i);
            stripe<T>(&g[i * UP], UP, 1, in_rows(vt.data(), U, LP),
                       [&](long r, long j, Lanes x) { store(&dp[r * LP + j], x); });
            scores(i);
            alignas(64) float dq[ROWS * C];
            const float* ds = N == 1 ? &ds_rows[i * LP] : p.data();
            stripe<T>(ds, LP, 1, by_k,
                       [&](long r, long c, Lanes x) { store(dq + r * C + c, x); });
            for (int r = 0; r < ROWS && i + r < L; r++)
                back(dq + r * C, i + r, scale, out + (i + r) * stride);
        }
        for (long j = 0; j < L; j += ROWS) {
            alignas(64) float dk[ROWS * C];
            stripe<T>(&ds_rows[j], 1, LP, by_q,
                       [&](long r, long c, Lanes x) { store(dk + r * C + c, x); });
            // Of the factor that q has, the base is taken back.
            for (int r = 0; r < ROWS && j + r < L; r++)
                back(dk + r * C, j + r, 0.6931471805599453f, out + (j + r) * stride + width);
            stripe<T>(&p_rows[j], 1, LP, by_g,
                       [&](long r, long c, Lanes x) {
                           if (j + r < L) T::put(out + (j + r) * stride + 2 * width + c, x);
                       });
        }
    }

    // Padded rows as a product that sums over them reads them: float32 as they are.
    Right summed_over(const Buffer& in, Buffer& paired, long rows) const {
        if (N == 1) return in_rows(in.data(), rows, C);
        Base::by_rows(numbers(in.data()), UP * N, paired);
        return in_rows(paired.data(), rows / N, C);
    }

    // P and dS of the queries from i on.
    void scores(long i) {
        Lanes sum[ROWS];
        float mean[ROWS];
        for (int r = 0; r < ROWS; r++) {
            sum[r] = Lanes{};
            for (long j = 0; j < LP; j += W) sum[r] += load(&s[r * LP + j]) * load(&dp[r * LP + j]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) mean[r] = total(sum[r]) * inverse[r];
        for (int r = 0; r < ROWS; r += N) {
            const long at = (i + r) / N * LP;
            for (long j = 0; j < LP; j += W) {
                Lanes weight[N], grad[N];
                for (int k = 0; k < N; k++) {
                    const long from = (r + k) * LP + j;
                    weight[k] = load(&s[from]) * inverse[r + k];
                    grad[k] = weight[k] * (load(&dp[from]) - mean[r + k]);
                    if (N == 2) T::put(numbers(&p[(r + k) * LP]) + j, grad[k]);
                }
                T::put_lanes(&p_rows[at + j], weight);
                T::put_lanes(&ds_rows[at + j], grad);
            }
        }
    }

    void back(const float* x, long j, float scale, Number* out) const {
        rotate<Single, T, C>(x, cos + j * E, sin + j * E, -1, scale, out);
    }
};

}  // namespace
