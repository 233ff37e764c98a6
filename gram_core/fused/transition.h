// Whole transitions of a group of sequences: K times f_L, once f_H, and the prior's guidance.
#pragma once

#include "deviation.h"
#include "stack.h"

namespace {

// The prior's heads, laid out; null: without mean, or without deviation.
struct Prior {
    const float *mean_gate_up, *mean_down, *std_gate_up, *std_down;
    Deviation deviation;
};

// f_L and f_H, laid out; low null: f_H alone, K + 1 times.
struct Stacks {
    const Packed *low, *high;
    long cycles;
};

// The state (h, l) of a group, and what a transition reads beside it.
template <class T>
struct Transitions {
    Worker<T>& w;
    const Stacks& stacks;
    const Prior& prior;
    const long D;
    Buffer h, low, e_x, context;

    Transitions(Worker<T>& worker, const Stacks& stacks, const Prior& prior)
        : w(worker), stacks(stacks), prior(prior), D(worker.D), h(worker.most * D),
          low(worker.most * D), e_x(worker.most * D), context(worker.most * D) {}

    // `noise` of this group, `apart` from sequence to sequence, null without deviation; `kept` of
    // each application's blocks and one more, or null.
    void step(const float* noise, long apart, const Kept<T>* kept) {
        const long blocks = w.shape.blocks, size = w.rows * D;
        auto of = [&](long application) { return kept ? kept + application * blocks : nullptr; };
        const bool flat = !stacks.low;
        for (long i = 0; i < size; i += W)
            store(&context[i], flat ? load(&e_x[i]) : load(&h[i]) + load(&e_x[i]));
        memcpy(w.residual, flat ? h.data() : low.data(), size * 4);
        for (long k = 0; k < stacks.cycles; k++)
            w.stack(context.data(), flat ? stacks.high : stacks.low, of(k));
        if (!flat) memcpy(low.data(), w.residual, size * 4);
        w.stack(flat ? context.data() : h.data(), stacks.high, of(stacks.cycles));
        guide(noise, apart);
        memcpy(h.data(), w.residual, size * 4);
    }

    // u += mean + std * noise
    void guide(const float* noise, long apart) {
        if (prior.std_gate_up) {
            w.gate(w.rounded, prior.std_gate_up, nullptr);
            head(prior.std_down, [&](long i, long d, Lanes x) {
                const float* row = noise + i / w.L * apart + i % w.L * D;
                return prior.deviation.of(x).std * load(row + d);
            });
        }
        if (prior.mean_gate_up) {
            w.gate(w.rounded, prior.mean_gate_up, nullptr);
            head(prior.mean_down, [](long, long, Lanes x) { return x; });
        }
    }

    template <class Part>
    void head(const float* down, Part part) {
        constexpr int N = T::IN_LANE;
        product<T>(w.hidden.data(), w.F / N, 1, w.rows, in_panels(down, w.F / N, D),
                   [&](long i, long d, Lanes x) {
                       float* at = &w.residual[i * D + d];
                       store(at, load(at) + part(i, d, x));
                   });
    }
};

}  // namespace
