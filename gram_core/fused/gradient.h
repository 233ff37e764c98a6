// The gradient of a stack of blocks, from what its forward kept.
//
// Groups of sequences take a block's gradient back to its input, each on one processor core, and
// leave the factors of the weights' gradients, which are summed over the positions of some groups, a
// span, at once. Each thread has sums of its own groups, always the same; in the end the threads'
// sums are added in their order: a sum depends on the number of threads, and on nothing else.
#pragma once

#include <atomic>
#include <thread>

#include "stack.h"

namespace {

// Groups whose factors are summed at once, and rows of a weight's gradient that are summed one after
// the other: processors without AVX-512 have smaller caches, by and large.
#ifdef __AVX512F__
constexpr long SPAN = 8, CHUNK = 48;
#else
constexpr long SPAN = 2, CHUNK = 24;
#endif
static_assert(CHUNK % W == 0, "a vector of a factor lies in one of its panels");

// A factor of weights' gradients, [depth, columns] lanes in panels of columns. Where positions are
// summed over, two neighbouring rows lie in one lane (bfloat16).
struct Factor {
    long panel, columns, depth;
    Raw lanes;

    Factor() = default;
    Factor(long panel, long columns, long depth)
        : panel(panel), columns(columns), depth(depth), lanes(raw(columns * depth)) {}
    long width(long c) const { return std::min(panel, columns - c / panel * panel); }
    float* at(long step, long c) {
        const long start = c / panel * panel;
        return lanes.get() + start * depth + step * width(c) + c - start;
    }
    const float* from(long c) const { return lanes.get() + c * depth; }  // a panel
};

// Factors of the weights' gradients, of the groups of one span.
template <class T>
struct Span {
    static constexpr int N = T::IN_LANE;
    const long group_rows;  // even
    // Left and right of each: of qkv's or the positions' gate and up's gradient, the mixing's, gate
    // and up's, down's.
    Factor first, x, second, mixed, gate_up, normed, down, hidden;

    explicit Span(const Shape& s) : group_rows(padded(s.group() * s.length, 2)) {
        const long depth = SPAN * group_rows / N, sequences = SPAN * s.group();
        const long D = s.dim, L = s.length, M = s.mixing;
        gate_up = Factor(CHUNK, 2 * s.ffn, depth);
        normed = Factor(PANEL, D, depth);
        down = Factor(CHUNK, D, depth);
        hidden = Factor(PANEL, s.ffn, depth);
        if (!s.blocks) return;  // SwiGLUs of channels alone
        if (!M) {
            first = Factor(CHUNK, 3 * D, depth);
            x = Factor(PANEL, D, depth);
            second = Factor(CHUNK, D, depth);
            mixed = Factor(PANEL, D, depth);
        } else {  // plain, sequence by sequence
            first = Factor(1, sequences * 2 * M, D / N);
            x = Factor(1, sequences * padded(L, W), D / N);
            second = Factor(1, sequences * L, D / N);
            mixed = Factor(1, sequences * M, D / N);
        }
    }
};

struct Gate {
    Lanes hidden, gate, up;  // silu(gate) * up, and the gradients
};
inline Gate gate_gradient(Lanes gate, Lanes up, Lanes grad) {
    const Lanes share = 1.f / (exponential(-gate) + 1.f), on = gate * share;
    return {on * up, grad * up * share * (1.f + gate - on), grad * on};
}

template <class T>
struct SwiglusBackward : Group<T> {
    using Base = Group<T>;
    using typename Base::Number;
    using Base::D, Base::F, Base::lanes, Base::N, Base::rounded, Base::rows;
    Buffer wide, gated;

    explicit SwiglusBackward(const Shape& s, long wide_lanes = 0)
        : Base(s), wide(std::max(wide_lanes, Base::most * F)), gated(Base::most * 2 * F / N) {}

    // Rows of numbers, from row `before` of a factor on, as a product that sums over rows reads them;
    // a zero row to an even number.
    void by_rows(const Number* from, Factor& to, long before) const {
        for (long j = 0; j < rows; j += 2)
            for (long c = 0; c < to.columns; c += W) {
                const Number* row = from + j * to.columns + c;
                const Lanes second = j + 1 < rows ? T::get(row + to.columns) : Lanes{};
                T::put_rows(to.at(before + j / N, c), to.width(c), T::get(row), second);
            }
    }

    // The residual += the gradient at the input of a SwiGLU, from what is rounded, its output's.
    // Weights as of y W; `group` is the span's group. `next` is read then.
    void swiglu(const float* down, const float* gate_up, const Number* input, const Number* kept,
                Span<T>& span, long group, Memory next = {}, Memory last = {}) {
        const long before = group * span.group_rows / N;
        by_rows(rounded, span.down, before);
        by_rows(input, span.normed, before);
        product<T>(lanes(rounded), D / N, 1, rows,
                   in_panels(down, D / N, F).then(Base::part(kept, rows * 2 * F)),
                   [&](long i, long f, Lanes x) { store(&wide[i * F + f], x); });
        Number* both = Base::numbers(gated.data());
        for (long i = 0; i < rows; i += 2)
            for (long f = 0; f < F; f += W) {
                Gate two[2] = {};
                for (long r = 0; r < 2 && i + r < rows; r++) {
                    const Number* row = kept + (i + r) * 2 * F + f;
                    two[r] = gate_gradient(T::get(row), T::get(row + F),
                                           load(&wide[(i + r) * F + f]));
                    T::put(both + (i + r) * 2 * F + f, two[r].gate);
                    T::put(both + (i + r) * 2 * F + F + f, two[r].up);
                }
                auto put = [&](Factor& to, long c, Lanes a, Lanes b) {
                    T::put_rows(to.at(before + i / N, c), to.width(c), a, b);
                };
                put(span.hidden, f, two[0].hidden, two[1].hidden);
                put(span.gate_up, f, two[0].gate, two[1].gate);
                put(span.gate_up, F + f, two[0].up, two[1].up);
            }
        Base::add(gated.data(), gate_up, 2 * F, next, last);
    }
};

template <class T>
struct Backward : SwiglusBackward<T> {
    using Base = SwiglusBackward<T>;
    using typename Base::Number;
    using Base::D, Base::residual, Base::rounded, Base::rows;
    using SwiglusBackward<T>::SwiglusBackward;

    // From the gradient in the residual, and rounded, to that of the mixing's input.
    virtual void mix(const Packed& weights, const Kept<T>& kept, Span<T>& span, long group) = 0;

    // One block of a group, the span's of that number: grad [positions, D] in place. `weights` as of
    // y W, `kept` of this group.
    void block(const Packed& weights, const Kept<T>& kept, Span<T>& span, long group,
               float* grad) {
        Base::residual = grad;
        norm(kept.out, kept.out_scale);
        const Shape& s = Base::shape;
        const Memory mixing = s.mixing ? Base::part(kept.first, Base::count * s.first())
                                       : Base::part(kept.mixed, rows * D);
        Base::swiglu(weights.down, weights.gate_up, kept.normed, kept.gate_up, span, group,
                     Base::part(kept.x, rows * D), mixing);
        norm(kept.normed, kept.scale);
        mix(weights, kept, span, group);
    }

    // The next group's part, behind this one's.
    Memory behind(const Number* kept) const { return Base::part(kept + rows * D, rows * D); }

    // Of y = x / rms(x), in place and rounded.
    void norm(const Number* y, const float* scale) {
        if constexpr (Base::N == 1) rounded = residual;  // which is read before it is added to
        for (long i = 0; i < rows; i++) {
            float* row = &residual[i * D];
            const Number* out = y + i * D;
            Lanes sum{};
            for (long d = 0; d < D; d += W) sum += load(row + d) * T::get(out + d);
            const float mean = total(sum) / D;
            for (long d = 0; d < D; d += W) {
                const Lanes x = (load(row + d) - T::get(out + d) * mean) * scale[i];
                store(row + d, x);
                if constexpr (Base::N > 1) T::put(rounded + i * D + d, x);
            }
        }
    }
};

template <class T>
struct AttentionBackward : Backward<T> {
    using Base = Backward<T>;
    using typename Base::Number;
    using Base::by_rows, Base::count, Base::D, Base::L, Base::lanes, Base::N, Base::numbers,
        Base::rounded, Base::rows, Base::shape;
    Buffer mixed, qkv;

    explicit AttentionBackward(const Shape& s)
        : Base(s), mixed(Base::most * D / N), qkv(Base::most * 3 * D / N) {}

    // One head of one sequence.
    virtual void head(const Number* qkv, const Number* grad, Number* out) = 0;

    void mix(const Packed& weights, const Kept<T>& kept, Span<T>& span, long group) override {
        const long before = group * span.group_rows / N;
        by_rows(rounded, span.second, before);
        by_rows(kept.mixed, span.mixed, before);
        by_rows(kept.x, span.x, before);
        Number *grad = numbers(mixed.data()), *out = numbers(qkv.data());
        product<T>(lanes(rounded), D / N, 1, rows,
                   in_panels(weights.second, D / N, D).then(Base::part(kept.first, rows * 3 * D)),
                   [&](long i, long d, Lanes x) { T::put(grad + i * D + d, x); });
        const long C = D / shape.heads;
        for (long s = 0; s < count; s++)
            for (long h = 0; h < shape.heads; h++) {
                const long at = s * L * 3 * D + h * C;
                head(kept.first + at, grad + s * L * D + h * C, out + at);
            }
        by_rows(out, span.first, before);
        Base::add(qkv.data(), weights.first, 3 * D, Base::behind(kept.out),
                  Base::behind(kept.normed));
    }
};

template <class T, int C>
struct GradientsOf : AttentionBackward<T> {
    using Number = typename T::Number;
    Gradient<T, C> one;
    GradientsOf(const Shape& s, const float* table)
        : AttentionBackward<T>(s), one(s.length, s.heads, table) {}
    void head(const Number* qkv, const Number* grad, Number* out) override {
        one.backward(qkv, grad, out);
    }
};

template <class T>
struct MixerBackward : Backward<T> {
    using Base = Backward<T>;
    using typename Base::Number;
    using Base::count, Base::D, Base::L, Base::N, Base::numbers, Base::residual, Base::rounded,
        Base::shape, Base::wide;
    const long M, LN, LP;
    Buffer columns, hidden, gates, x;

    explicit MixerBackward(const Shape& s)
        : Base(s, s.mixing * s.dim), M(s.mixing), LN(padded(L, N) / N), LP(padded(L, W)),
          columns((L + 1) * D), hidden(M * D / N), gates(2 * M * D / N), x(LP * D / N) {}

    void mix(const Packed& weights, const Kept<T>& kept, Span<T>& span, long group) override {
        for (long s = 0; s < count; s++) {
            const long sequence = group * shape.group() + s;
            float* g = &residual[s * L * D];
            memcpy(span.second.at(0, sequence * L), rounded + s * L * D, L * D / N * 4);
            pair_rows<T>(g, L, D, columns.data());
            product<T>(weights.second, row_lanes<T>(L), 1, M, in_rows(columns.data(), LN, D),
                       [&](long m, long d, Lanes sum) { store(&wide[m * D + d], sum); });
            const Number* both = kept.first + s * 2 * M * D;
            Number* left = numbers(span.first.at(0, sequence * 2 * M));
            Number* on = numbers(hidden.data());
            for (long m = 0; m < M; m += 2)
                for (long d = 0; d < D; d += W) {
                    Gate two[2];
                    for (long r = 0; r < 2; r++) {
                        const long at = (m + r) * D + d, up = M * D + at;
                        two[r] = gate_gradient(T::get(both + at), T::get(both + up),
                                               load(&wide[at]));
                        T::put(on + at, two[r].hidden);
                        T::put(left + at, two[r].gate);
                        T::put(left + up, two[r].up);
                    }
                    T::put_rows(&gates[m / N * D + d], D, two[0].gate, two[1].gate);
                    T::put_rows(&gates[(M + m) / N * D + d], D, two[0].up, two[1].up);
                }
            memcpy(x.data(), kept.x + s * L * D, L * D * sizeof(Number));
            transposed(hidden, M, span.mixed.at(0, sequence * M));
            transposed(x, LP, span.x.at(0, sequence * LP));
            Right both_gates = in_rows(gates.data(), 2 * M / N, D);
            if (s + 1 == count)
                both_gates = both_gates.then(Base::behind(kept.out), Base::behind(kept.normed));
            product<T>(weights.first, row_lanes<T>(2 * M), 1, L, both_gates,
                       [&](long j, long d, Lanes sum) {
                           store(g + j * D + d, load(g + j * D + d) + sum);
                       });
        }
    }

    // [height, D / N] -> [D / N, height]
    void transposed(const Buffer& in, long height, float* out) const {
        for (long j = 0; j < height; j += W)
            for (long u = 0; u < D / N; u += W)
                transpose(in.data() + j * (D / N) + u, D / N, out + u * height + j, height);
    }
};

inline void put(float* to, Lanes x, bool first) { store(to, first ? x : load(to) + x); }

// grad[row .. row + rows) += left^T right, summed over `steps` lanes of positions; or, the first
// time, in place of what lies there.
template <class T>
void sum(const Factor& left, const Factor& right, long steps, float* grad, long row, long rows,
         bool first) {
    const Memory behind = {{left.from(row) + rows * left.depth}, rows * steps};
    product<T>(left.from(row), 1, rows, rows,
               Right{right.from(0), steps, right.columns, 0, right.depth}.then(behind),
               [&](long o, long i, Lanes x) {
                   float* to = grad + (row + o) * right.columns + i;
                   __builtin_prefetch(to + PANEL, 1, 2);  // of the next panel
                   put(to, x, first);
               });
}

// Of a thread's groups: the span that is taken next, and how many are summed, layer after layer.
struct Turns {
    std::atomic<long> next{0}, summed{0};

    void await(long count) const {
        for (long looks = 1; summed < count; looks++)
            if (looks % 1024) _mm_pause();
            else std::this_thread::yield();
    }
};

// Gradients of weights, of which each thread has sums over groups of its own.
struct Sums {
    const std::vector<long> sizes;
    std::vector<std::vector<float*>> of;  // each thread's; the first's are what is asked for
    std::vector<std::vector<Raw>> memory;
    std::vector<Turns> turns;

    Sums(float* const* out, std::vector<long> sizes_of, long threads)
        : sizes(std::move(sizes_of)), of(threads), memory(threads), turns(threads) {
        of[0].assign(out, out + sizes.size());
    }

    // All threads call this, and wait for each other.
    void allocate(long thread) {
        if (thread == 0) return;
        for (long size : sizes) {
            memory[thread].push_back(raw(size));
            of[thread].push_back(memory[thread].back().get());
        }
    }

    // For each layer and each span of groups, begin to end: factors(layer, begin, end), and then
    // add(layer, begin, end, sums, first) to a thread's sums; in the end all of these are added, in
    // the order of threads. All threads of the team call this. One that is done with its own groups
    // takes spans of the others'; but a span is added after the one before it, whoever has taken
    // which, so that sums are always the same.
    template <class Factors, class Add>
    void run(long layers, long groups, long me, long team, Factors factors, Add add) {
        for (long k = 0; k < team; k++) {
            const long owner = (me + k) % team;
            const long begin = owner * groups / team, stop = (owner + 1) * groups / team;
            const long spans = (stop - begin + SPAN - 1) / SPAN;
            if (k && spans == 1) continue;  // each layer waits for the one before
            Turns& t = turns[owner];
            for (long n; (n = t.next++) < layers * spans; t.summed = n + 1) {
                const long from = begin + n % spans * SPAN, to = std::min(stop, from + SPAN);
                t.await(n + 1 - spans);  // the same groups in the layer before
                factors(n / spans, from, to);
                t.await(n);
                add(n / spans, from, to, of[owner].data(), n % spans == 0);
            }
        }
#pragma omp barrier
        for (std::size_t k = 0; k < sizes.size(); k++)
#pragma omp for schedule(static) nowait
            for (long i = 0; i < sizes[k]; i += W)
                for (long t = 1; t < team; t++)
                    store(of[0][k] + i, load(of[0][k] + i) + load(of[t][k] + i));
    }
};

// Some rows of a weight.
struct Chunk {
    int weight;
    long row, rows;
};
inline std::vector<Chunk> chunks_of(const Shape& s) {
    const long out[] = {s.mixing ? 2 * s.mixing : 3 * s.dim, s.mixing ? s.length : s.dim,
                        2 * s.ffn, s.dim};
    std::vector<Chunk> all;
    for (int w = s.blocks ? 0 : 2; w < 4; w++)
        for (long row = 0; row < out[w]; row += CHUNK)
            all.push_back({w, row, std::min(CHUNK, out[w] - row)});
    return all;
}

// Add a chunk's sum over a span of `sequences` sequences to the gradients of a block's weights, of
// which the first span finds none.
template <class T>
void sum_chunk(const Shape& s, const Span<T>& span, Chunk c, long sequences, float* const* to,
               bool first) {
    constexpr int N = T::IN_LANE;
    const long D = s.dim, M = s.mixing, L = s.length;
    const long rest = sequences % s.group();  // of a last group that is not whole
    const long steps = (sequences / s.group() * span.group_rows + padded(rest * L, 2)) / N;
    const Factor* factors[][2] = {{&span.first, &span.x}, {&span.second, &span.mixed},
                                  {&span.gate_up, &span.normed}, {&span.down, &span.hidden}};
    float* grad = to[c.weight];
    if (c.weight > 1 || !M) {
        const auto& [left, right] = factors[c.weight];
        return sum<T>(*left, *right, steps, grad, c.row, c.rows, first);
    }
    // Of the mixing of positions channels are summed over, sequence by sequence.
    const long width = padded(L, W);
    for (long q = 0; q < sequences; q++, first = false) {
        if (c.weight == 0)
            product<T>(span.first.from(q * 2 * M + c.row), D / N, 1, c.rows,
                       in_rows(span.x.from(q * width), D / N, width),
                       [&](long m, long j, Lanes x) {
                           float* at = grad + (c.row + m) * L + j;
                           if (j + W <= L) return put(at, x, first);
                           for (long l = 0; j + l < L; l++) at[l] = first ? x[l] : at[l] + x[l];
                       });
        else
            product<T>(span.second.from(q * L + c.row), D / N, 1, c.rows,
                       in_rows(span.mixed.from(q * M), D / N, M), [&](long j, long m, Lanes x) {
                           put(grad + (c.row + j) * M + m, x, first);
                       });
    }
}

}  // namespace
