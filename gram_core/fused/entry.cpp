// What gram_core/fused/operations.py calls: it compiles this file for the processor that it finds.

#include <atomic>

#include "stack.h"

namespace {

constexpr int UNFIT = 1, NO_MEMORY = 2;

struct Call {
    const void* qkv;
    const float* table;
    const void* grad;  // null: forward
    void* out;
    long batch, length, heads;
    int threads;
};

template <class T, int C>
int run(const Call& call) {
    using Number = typename T::Number;
    const Number *in = static_cast<const Number*>(call.qkv);
    const Number *grad = static_cast<const Number*>(call.grad);
    Number* out = static_cast<Number*>(call.out);
    const long part = call.length * C * call.heads;  // numbers of q in one row of the batch
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(call.threads)
    {
        std::unique_ptr<Head<T, C>> head;
        std::unique_ptr<Gradient<T, C>> gradient;
        try {
            if (grad) gradient.reset(new Gradient<T, C>(call.length, call.heads, call.table));
            else head.reset(new Head<T, C>(call.length, call.heads, call.table));
        } catch (const std::bad_alloc&) {
            failed = NO_MEMORY;
        }
#pragma omp for
        for (long i = 0; i < call.batch * call.heads; i++) {
            const long b = i / call.heads * part, h = i % call.heads * C;
            if (gradient) gradient->backward(in + 3 * b + h, grad + b + h, out + 3 * b + h);
            else if (head) head->forward(in + 3 * b + h, out + b + h);
        }
    }
    return failed;
}

template <class T>
int of_width(long channels, const Call& call) {
    switch (channels) {
        case 16: return run<T, 16>(call);
        case 32: return run<T, 32>(call);
        case 64: return run<T, 64>(call);
        case 128: return run<T, 128>(call);
    }
    return UNFIT;
}

template <class T>
std::unique_ptr<Worker<T>> worker(const Shape& shape, float eps, const float* table) {
    using Made = std::unique_ptr<Worker<T>>;
    if (shape.mixing) return Made(new MixerWorker<T>(shape, eps));
    switch (shape.dim / shape.heads) {
        case 16: return Made(new AttentionWorker<T, 16>(shape, eps, table));
        case 32: return Made(new AttentionWorker<T, 32>(shape, eps, table));
        case 64: return Made(new AttentionWorker<T, 64>(shape, eps, table));
        case 128: return Made(new AttentionWorker<T, 128>(shape, eps, table));
    }
    return nullptr;
}

struct StackCall {
    const void *a, *b;
    bool a_half, b_half;
    const float* table;
    const float* const* weights;  // four a block
    long blocks;
    void* out;
    Shape shape;
    float eps;
    int threads;
};

// Lanes of a block's four weights, laid out.
template <class T>
void sizes(const Shape& s, long lanes[4]) {
    lanes[0] = s.mixing ? padded(2 * s.mixing, ROWS) * row_lanes<T>(s.length)
                        : 3 * s.dim * s.dim / T::IN_LANE;
    lanes[1] = s.mixing ? padded(s.length, ROWS) * row_lanes<T>(s.mixing)
                        : s.dim * s.dim / T::IN_LANE;
    lanes[2] = 2 * s.ffn * s.dim / T::IN_LANE;
    lanes[3] = s.ffn * s.dim / T::IN_LANE;
}

template <class T>
void pack(int which, const Shape& s, const float* weight, float* to) {
    switch (which) {
        case 0:
            return s.mixing ? pack_left<T>(weight, 2 * s.mixing, s.length, to)
                            : pack_right<T>(weight, 3 * s.dim, s.dim, to);
        case 1:
            return s.mixing ? pack_left<T>(weight, s.length, s.mixing, to)
                            : pack_right<T>(weight, s.dim, s.dim, to);
        case 2: return pack_right<T>(weight, 2 * s.ffn, s.dim, to);
        case 3: return pack_right<T>(weight, s.dim, s.ffn, to);
    }
}

template <class T>
void read(Worker<T>& worker, const StackCall& call, long at, long count) {
    const float *a = static_cast<const float*>(call.a) + at;
    const float *b = static_cast<const float*>(call.b) + at;
#ifdef __AVX512BF16__
    const uint16_t *a_half = static_cast<const uint16_t*>(call.a) + at;
    const uint16_t *b_half = static_cast<const uint16_t*>(call.b) + at;
    if (call.a_half && call.b_half)
        return worker.template read<Half, Half>(a_half, b_half, count);
    if (call.a_half) return worker.template read<Half, Single>(a_half, b, count);
    if (call.b_half) return worker.template read<Single, Half>(a, b_half, count);
#endif
    worker.template read<Single, Single>(a, b, count);
}

template <class T>
int run_stack(const StackCall& call) {
    const Shape& s = call.shape;
    long lanes[4], whole = 0;
    sizes<T>(s, lanes);
    for (long n : lanes) whole += padded(n, W);
    Raw packed;
    try {
        packed = raw(whole * call.blocks);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    std::vector<float*> places;
    float* next = packed.get();
    for (long k = 0; k < 4 * call.blocks; k++) {
        places.push_back(next);
        next += padded(lanes[k % 4], W);
    }
    const long group = s.group(), groups = (s.batch + group - 1) / group;
    auto* out = static_cast<typename T::Number*>(call.out);
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(call.threads)
    {
#pragma omp for schedule(dynamic)
        for (long k = 0; k < 4 * call.blocks; k++)
            pack<T>(k % 4, s, call.weights[k], places[k]);
        std::unique_ptr<Worker<T>> mine;
        try {
            mine = worker<T>(s, call.eps, call.table);
            if (!mine) failed = UNFIT;
        } catch (const std::bad_alloc&) {
            failed = NO_MEMORY;
        }
#pragma omp for schedule(dynamic)
        for (long g = 0; g < groups; g++) {
            if (!mine) continue;
            const long count = std::min(group, s.batch - g * group);
            const long at = g * group * s.length * s.dim;
            read(*mine, call, at, count);
            for (long k = 0; k < call.blocks; k++) {
                const Packed w{places[4 * k], places[4 * k + 1], places[4 * k + 2],
                               places[4 * k + 3]};
                mine->mix(w, count);
                mine->norm(count, mine->numbers(mine->narrow.data()));
                mine->channels(w);
                mine->norm(count, out + at);
            }
        }
    }
    return failed;
}

}  // namespace

// qkv [batch, length, 3, heads, channels]; table [2, length, channels / 2]; grad (null: forward)
// [batch, length, heads, channels]; out as grad, for a backward as qkv. 0: done; UNFIT: not a format
// or width of these files; NO_MEMORY.
extern "C" int gram_attend(const void* qkv, const float* table, const void* grad, void* out,
                           long batch, long length, long heads, long channels, int half,
                           int threads) {
    const Call call{qkv, table, grad, out, batch, length, heads, threads};
#ifdef __AVX512BF16__
    if (half) return of_width<Half>(channels, call);
#endif
    return half ? UNFIT : of_width<Single>(channels, call);
}

// a, b [batch, length, dim], each float32 or bfloat16; weights: four a block, [out, in] of float32;
// mixing: hidden width of the mixer, 0 for attention, whose table is as above. out [batch, length,
// dim] in the products' format.
extern "C" int gram_stack(const void* a, int a_half, const void* b, int b_half, const float* table,
                          const float* const* weights, long blocks, void* out, long batch,
                          long length, long dim, long heads, long ffn, long mixing, float eps,
                          int half, int threads) {
    const StackCall call{a, b, a_half != 0, b_half != 0, table, weights, blocks, out,
                         {batch, length, dim, heads, ffn, mixing}, eps, threads};
#ifdef __AVX512BF16__
    return half ? run_stack<Half>(call) : run_stack<Single>(call);
#else
    return half || a_half || b_half ? UNFIT : run_stack<Single>(call);
#endif
}
