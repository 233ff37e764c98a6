// What attention.py calls.
#pragma once

#include <atomic>
#include <memory>

#include "attention.h"

namespace {

// As in attention.py, field by field. qkv [batch, length, 3, heads, channels]; table [2, length,
// channels / 2], of float32; grad (null: forward) [batch, length, heads, channels]; out as grad, for
// a backward as qkv.
struct AttentionCall {
    const void* qkv;
    const float* table;
    const void* grad;
    void* out;
    long batch, length, heads, channels;
    int half, threads;
    // Threads that have a head to compute.
    int team() const { return std::max(1L, std::min<long>(threads, batch * heads)); }
};

template <class T, int C>
int run(const AttentionCall& call) {
    using Number = typename T::Number;
    const Number *in = static_cast<const Number*>(call.qkv);
    const Number *grad = static_cast<const Number*>(call.grad);
    Number* out = static_cast<Number*>(call.out);
    const long part = call.length * C * call.heads;  // numbers of q in one row of the batch
    std::atomic<int> failed{0};
#pragma omp parallel num_threads(call.team())
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
int attend(const AttentionCall& call) {
    return of_channels(call.channels, UNFIT, [&](auto c) { return run<T, c>(call); });
}

}  // namespace
