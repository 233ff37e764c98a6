// What heads.py calls.
#pragma once

#include <omp.h>

#include <atomic>

#include "heads.h"

namespace {

// As in heads.py, field by field. x, each head's out, their gradients: [positions, dim] of float32.
struct HeadsCall {
    const float* x;
    const float* const* weights;  // gate and up, down, of each head
    float* const* out;
    void* kept;    // each head's gate and up
    float* slope;  // of the deviation, which is the last head's; null: none
    const float* const* out_grad;
    float* x_back;
    float* const* weights_back;
    long positions, dim, ffn, heads;
    long kept_numbers;  // room for so many
    float offset, floor;
    int exponential, half, threads;
    // Positions as sequences of one, and no stack.
    Shape shape() const { return {positions, 1, dim, 1, ffn, 0, 0}; }
    int team() const { return std::max(1L, std::min<long>(threads, shape().groups())); }
    template <class T>
    typename T::Number* gate_up(long head) const {
        return static_cast<typename T::Number*>(kept) + head * positions * 2 * ffn;
    }
    // Null but for the deviation.
    float* slope_of(long head) const { return head + 1 == heads ? slope : nullptr; }
    bool has_room() const { return kept_numbers == heads * positions * 2 * ffn; }
    // Allocates `packing`.
    template <class T>
    std::vector<Swiglu> laid_out(Packing<T>& packing, bool back) const {
        std::vector<Swiglu> all;
        const Side side = back ? Side::BACK_RIGHT : Side::RIGHT;
        std::vector<long> at;
        for (long k = 0; k < heads; k++) {
            at.push_back(packing.add(side, weights[2 * k], 2 * ffn, dim));
            at.push_back(packing.add(side, weights[2 * k + 1], dim, ffn));
        }
        packing.allocate();
        for (long k = 0; k < heads; k++)
            all.push_back({packing[at[2 * k]], packing[at[2 * k + 1]]});
        return all;
    }
};

template <class T>
int run_heads(const HeadsCall& c) {
    if (!c.has_room()) return UNFIT;
    const Shape s = c.shape();
    Packing<T> packing;
    const std::vector<Swiglu> heads = c.template laid_out<T>(packing, false);
    const Deviation deviation{c.offset, c.floor, c.exponential != 0};
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(c.team())
    {
#pragma omp for schedule(dynamic)
        for (long k = 0; k < long(packing.jobs.size()); k++) packing.pack_one(k);
        std::unique_ptr<Swiglus<T>> mine;
        try {
            mine.reset(new Swiglus<T>(s));
        } catch (const std::bad_alloc&) {
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (long g = 0; g < s.groups(); g++) {
            if (!mine) continue;
            mine->begin(g);
            const long at = mine->first * c.dim, size = mine->rows * c.dim;
            const auto* x = mine->in_format(c.x + at, mine->narrow);
            auto gate_up = [&](long k) {
                return c.template gate_up<T>(k) + mine->first * 2 * c.ffn;
            };
            for (long k = 0; k < c.heads; k++) {
                const bool last = k + 1 == c.heads;  // then the next group's x
                const Memory next = last ? Memory{{c.x + at + size}, size}
                                         : mine->room(gate_up(k + 1), mine->rows * 2 * c.ffn);
                float* slope = c.slope_of(k);
                head_forward<T>(*mine, x, heads[k], deviation,
                                {c.out[k] + at, slope ? slope + at : nullptr}, gate_up(k), next);
            }
        }
    }
    return failed;
}

// A group's gradient at the heads' input, and the factors of their weights', as the spans' group of
// that number. `given` has room for the input.
template <class T>
void head_gradients(const HeadsCall& c, const std::vector<Swiglu>& heads, SwiglusBackward<T>& mine,
                    Buffer& given, std::vector<Span<T>>& spans, long group) {
    const long at = mine.first * c.dim, size = mine.rows * c.dim;
    mine.residual = c.x_back + at;
    std::fill(mine.residual, mine.residual + size, 0.f);
    const auto* x = mine.in_format(c.x + at, given);
    for (long k = 0; k < c.heads; k++) {
        const float *grad = c.out_grad[k] + at, *slope = c.slope_of(k);
        for (long i = 0; i < size; i += W)
            T::put(mine.rounded + i,
                   slope ? load(grad + i) * load(slope + at + i) : load(grad + i));
        const bool last = k + 1 == c.heads;  // then the next group's
        const float* next = last ? c.out_grad[0] + at + size : c.out_grad[k + 1] + at;
        const float* slopes = last ? nullptr : c.slope_of(k + 1);
        const float* beside = slopes ? slopes + at : c.x + at + size;
        mine.swiglu(heads[k].down, heads[k].gate_up, x,
                    c.template gate_up<T>(k) + mine.first * 2 * c.ffn, spans[k], group,
                    {{next}, size}, {{beside}, size});
    }
}

template <class T>
int run_heads_backward(const HeadsCall& c) {
    if (!c.has_room()) return UNFIT;
    const Shape s = c.shape();
    Packing<T> packing;
    const std::vector<Swiglu> heads = c.template laid_out<T>(packing, true);
    const std::vector<Chunk> chunks = chunks_of(s);
    std::vector<long> sizes;
    for (long k = 0; k < 2 * c.heads; k++) sizes.push_back((2 - k % 2) * c.ffn * c.dim);
    Sums sums(c.weights_back, sizes, c.team());
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(c.team())
    {
        const long me = omp_get_thread_num(), team = omp_get_num_threads();
#pragma omp for schedule(dynamic)
        for (long k = 0; k < long(packing.jobs.size()); k++) packing.pack_one(k);
        std::unique_ptr<SwiglusBackward<T>> mine;
        std::vector<Span<T>> spans;  // of each head
        Buffer given;
        try {
            mine.reset(new SwiglusBackward<T>(s));
            for (long k = 0; k < c.heads; k++) spans.emplace_back(s);
            given.resize((T::IN_LANE - 1) * s.group() * c.dim / T::IN_LANE);
            sums.allocate(me);
        } catch (const std::bad_alloc&) {
            failed = NO_MEMORY;
        }
#pragma omp barrier
        auto factors = [&](long, long begin, long end) {
            for (long g = begin; g < end; g++) {
                mine->begin(g);
                head_gradients<T>(c, heads, *mine, given, spans, g - begin);
            }
        };
        auto add = [&](long, long begin, long end, float* const* weights, bool first) {
            const long count = std::min(end * s.group(), s.batch) - begin * s.group();
            for (long k = 0; k < c.heads; k++) {
                float* const to[] = {nullptr, nullptr, weights[2 * k], weights[2 * k + 1]};
                for (const Chunk& chunk : chunks)
                    sum_chunk<T>(s, spans[k], chunk, count, to, first);
            }
        };
        if (!failed) sums.run(1, s.groups(), me, team, factors, add);
    }
    return failed;
}

}  // namespace
