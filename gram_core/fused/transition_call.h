// What transition.py calls.
#pragma once

#include <omp.h>

#include <atomic>

#include "gradient.h"
#include "transition.h"

namespace {

// Made by mixing: of positions, or attention's for its width of heads; null: not a width of these.
template <class T>
std::unique_ptr<Worker<T>> worker(const Shape& s, float eps, const float* table) {
    using Made = std::unique_ptr<Worker<T>>;
    if (s.mixing) return Made(new MixerWorker<T>(s, eps));
    return of_channels(s.dim / s.heads, Made(), [&](auto c) {
        return Made(new HeadsOf<T, c>(s, eps, table));
    });
}

template <class T>
std::unique_ptr<Backward<T>> backward(const Shape& s, const float* table) {
    using Made = std::unique_ptr<Backward<T>>;
    if (s.mixing) return Made(new MixerBackward<T>(s));
    return of_channels(s.dim / s.heads, Made(),
                       [&](auto c) { return Made(new GradientsOf<T, c>(s, table)); });
}

// Sequences that go through so many transitions together.
struct Course {
    long first, count, transitions;
};

// As in transition.py, field by field. All numbers are float32, but for those that are kept.
struct TransitionCall {
    const float *h, *low, *e_x, *noise, *table;
    const float* const* stacks;  // four weights a block: f_H's blocks, then f_L's, if there is one
    const float* const* prior;   // gate and up, down: of the mean, of the deviation; or nulls
    float *h_out, *low_out;
    void* kept;     // null: nothing is kept
    float* scales;  // of what is kept
    // For the gradient: of both outputs; of the inputs, of the weights as in `stacks`.
    const float *h_grad, *low_grad;
    float *h_back, *low_back, *e_x_back;
    float* const* weights_back;
    long batch, length, dim, heads, ffn, mixing, blocks, hierarchical, cycles, transitions;
    long ahead, more;  // so many sequences, the first ones, go so many transitions further
    long kept_numbers;  // room for so many
    long noise_transition, noise_sequence;  // numbers from one's noise to the next one's
    float eps, offset, floor;
    int exponential, half, threads;
    Shape shape() const { return {batch, length, dim, heads, ffn, mixing, blocks}; }
    long stack_count() const { return hierarchical ? 2 : 1; }
    // Of groups and what is left of them, those that go further first.
    std::vector<Course> courses() const {
        std::vector<Course> all;
        const long group = shape().group();
        for (long first = 0; first < batch; first += all.back().count) {
            const bool further = first < ahead;
            const long count = std::min(group, (further ? std::min(ahead, batch) : batch) - first);
            all.push_back({first, count, transitions + (further ? more : 0)});
        }
        return all;
    }
    // Threads that have one of so many to compute.
    int team(long groups) const { return std::max(1L, std::min<long>(threads, groups)); }
    template <class T>
    bool has_room() const {
        return !kept || kept_numbers == (cycles + 1) * Kept<T>::of_application(shape());
    }
};

// Where the stacks' weights will be in a packing, as products forward or backward take them.
template <class T>
std::vector<long> add_stacks(Packing<T>& packing, const TransitionCall& c, bool back) {
    const Side right = back ? Side::BACK_RIGHT : Side::RIGHT;
    const Side left = back ? Side::BACK_LEFT : Side::LEFT;
    const long D = c.dim, F = c.ffn, M = c.mixing, L = c.length;
    struct Weight {
        Side side;
        long out, in;
    };
    const Weight block[] = {M ? Weight{left, 2 * M, L} : Weight{right, 3 * D, D},
                            M ? Weight{left, L, M} : Weight{right, D, D},
                            {right, 2 * F, D}, {right, D, F}};
    std::vector<long> at(4 * c.stack_count() * c.blocks);
    for (long b = 0; b < c.stack_count() * c.blocks; b++)
        for (long k = 0; k < 4; k++) {
            const long which = back ? 3 - k : k;  // as they are used
            const Weight& w = block[which];
            at[4 * b + which] = packing.add(w.side, c.stacks[4 * b + which], w.out, w.in);
        }
    return at;
}

template <class T>
std::vector<Packed> packed_stacks(const Packing<T>& packing, const std::vector<long>& at) {
    std::vector<Packed> all;
    for (std::size_t k = 0; k < at.size(); k += 4)
        all.push_back({packing[at[k]], packing[at[k + 1]], packing[at[k + 2]], packing[at[k + 3]]});
    return all;
}

// What each application of a stack keeps of each of its blocks; and nothing, after the last.
template <class T>
std::vector<Kept<T>> kept_of(const TransitionCall& c) {
    std::vector<Kept<T>> all;
    for (long a = 0; c.kept && a <= c.cycles; a++)
        for (long b = 0; b < c.blocks; b++) all.emplace_back(c.shape(), c.kept, c.scales, a, b);
    all.emplace_back();
    return all;
}

template <class T>
int run_transitions(const TransitionCall& c) {
    if (!c.template has_room<T>()) return UNFIT;
    const Shape s = c.shape();
    Packing<T> packing;
    const std::vector<long> places = add_stacks(packing, c, false);
    long head[4] = {};
    for (int k = 0; k < 4; k++)
        if (c.prior[k])
            head[k] = packing.add(Side::RIGHT, c.prior[k], k % 2 ? c.dim : 2 * c.ffn,
                                  k % 2 ? c.ffn : c.dim);
    packing.allocate();
    auto place = [&](int k) { return c.prior[k] ? packing[head[k]] : nullptr; };
    const Prior prior{place(0), place(1), place(2), place(3),
                      {c.offset, c.floor, c.exponential != 0}};
    const std::vector<Packed> blocks = packed_stacks(packing, places);
    const Stacks stacks{c.hierarchical ? blocks.data() + c.blocks : nullptr, blocks.data(),
                        c.cycles};
    const std::vector<Kept<T>> kept = kept_of<T>(c);
    const std::vector<Course> courses = c.courses();
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(c.team(courses.size()))
    {
#pragma omp for schedule(dynamic)
        for (long k = 0; k < long(packing.jobs.size()); k++) packing.pack_one(k);
        std::unique_ptr<Worker<T>> mine;
        std::unique_ptr<Transitions<T>> state;
        try {
            mine = worker<T>(s, c.eps, c.table);
            if (mine) state.reset(new Transitions<T>(*mine, stacks, prior));
            else failed = UNFIT;
        } catch (const std::bad_alloc&) {
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (long k = 0; k < long(courses.size()); k++) {
            if (!state) continue;
            const Course& course = courses[k];
            mine->take(course.first, course.count);
            const long at = course.first * s.length * s.dim, bytes = mine->rows * s.dim * 4;
            memcpy(state->h.data(), c.h + at, bytes);
            memcpy(state->low.data(), c.low + at, bytes);
            memcpy(state->e_x.data(), c.e_x + at, bytes);
            for (long t = 0; t < course.transitions; t++) {
                const float* noise = c.noise + t * c.noise_transition;
                state->step(c.noise ? noise + course.first * c.noise_sequence : nullptr,
                            c.noise_sequence, c.kept ? kept.data() : nullptr);
            }
            memcpy(c.h_out + at, state->h.data(), bytes);
            memcpy(c.low_out + at, state->low.data(), bytes);
        }
    }
    return failed;
}

// What a group's gradient at the input of application `a` of a stack is the gradient of; the
// group's from `at` on, `size` numbers. `grad` is then that of the application before.
inline void hand_on(const TransitionCall& c, long a, long at, long size, float* grad) {
    float *h = c.h_back + at, *e_x = c.e_x_back + at;
    const bool last = a == c.cycles && c.hierarchical;  // f_H(h, l)
    const bool first = a == c.cycles - c.hierarchical;  // of those that read e_x
    for (long i = 0; i < size; i += W) {
        const Lanes g = load(grad + i);
        if (last) {
            store(h + i, g);
            store(grad + i, g + load(c.low_grad + at + i));
        } else {  // f(., h + e_x), or where there is no f_L f(., e_x)
            put(e_x + i, g, first);
            if (c.hierarchical) store(h + i, load(h + i) + g);
        }
    }
}

// Numbers of all weights of the stacks, in their order.
inline std::vector<long> weight_sizes(const TransitionCall& c) {
    const long D = c.dim, F = c.ffn, M = c.mixing, L = c.length;
    const long block[] = {M ? 2 * M * L : 3 * D * D, M ? L * M : D * D, 2 * F * D, D * F};
    std::vector<long> all;
    for (long k = 0; k < 4 * c.blocks * c.stack_count(); k++) all.push_back(block[k % 4]);
    return all;
}

template <class T>
int run_backward(const TransitionCall& c) {
    if (!c.template has_room<T>()) return UNFIT;
    const Shape s = c.shape();
    const long D = s.dim, L = s.length;
    Packing<T> packing;
    const std::vector<long> places = add_stacks(packing, c, true);
    packing.allocate();
    const std::vector<Packed> blocks = packed_stacks(packing, places);
    const std::vector<Kept<T>> kept = kept_of<T>(c);
    const std::vector<Chunk> chunks = chunks_of(s);
    // The gradient as it goes from application to application: in the end that of the first's
    // argument, l, or h where there is no f_L.
    float* grad = c.hierarchical ? c.low_back : c.h_back;
    const int threads = c.team(s.groups());
    Sums sums(c.weights_back, weight_sizes(c), threads);
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(threads)
    {
        const long me = omp_get_thread_num(), team = omp_get_num_threads();
#pragma omp for schedule(dynamic)
        for (long k = 0; k < long(packing.jobs.size()); k++) packing.pack_one(k);
        std::unique_ptr<Backward<T>> mine;
        std::unique_ptr<Span<T>> span;
        try {
            mine = backward<T>(s, c.table);
            span.reset(new Span<T>(s));
            sums.allocate(me);
            if (!mine) failed = UNFIT;
        } catch (const std::bad_alloc&) {
            failed = NO_MEMORY;
        }
#pragma omp barrier
        // A layer is a block of an application, from the last one of the last on.
        const long layers = (c.cycles + 1) * c.blocks;
        auto block = [&](long layer) { return layers - 1 - layer; };
        auto which = [&](long layer) {  // of the weights' blocks
            const bool low = c.hierarchical && layer >= c.blocks;
            return block(layer) % c.blocks + (low ? c.blocks : 0);
        };
        auto factors = [&](long layer, long begin, long end) {
            for (long g = begin; g < end; g++) {
                mine->begin(g);
                const long at = mine->first * L * D, size = mine->rows * D;
                if (layer == 0) memcpy(grad + at, c.h_grad + at, size * 4);
                mine->block(blocks[which(layer)], kept[block(layer)].from(s, mine->first), *span,
                            g - begin, grad + at);
                if (block(layer) % c.blocks == 0)
                    hand_on(c, block(layer) / c.blocks, at, size, grad + at);
            }
        };
        auto add = [&](long layer, long begin, long end, float* const* to, bool first) {
            const long count = std::min(end * s.group(), s.batch) - begin * s.group();
            first = first && layer < (1 + c.hierarchical) * c.blocks;  // application of the block
            for (const Chunk& chunk : chunks)
                sum_chunk<T>(s, *span, chunk, count, to + 4 * which(layer), first);
        };
        if (!failed) sums.run(layers, s.groups(), me, team, factors, add);
    }
    return failed;
}

}  // namespace
