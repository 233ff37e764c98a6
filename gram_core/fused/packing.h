// Weights as the products' factors.
#pragma once

#include <memory>
#include <vector>

#include "lanes.h"

namespace {

struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Raw = std::unique_ptr<float[], Free>;  // as it comes: not filled with zeros

inline Raw raw(long lanes) { return Raw(new (std::align_val_t(64)) float[lanes]); }

// A row of numbers padded to whole vectors, in lanes.
template <class T>
constexpr long row_lanes(long numbers) {
    return padded(numbers, W) / T::IN_LANE;
}

// How a weight [out, in] enters a product.
enum class Side {
    RIGHT,       // of x W^T: panels of [in / N, out] lanes
    LEFT,        // of W x: rows as they are
    BACK_RIGHT,  // of y W: panels of [out / N, in] lanes
    BACK_LEFT,   // of W^T y: columns as rows
};

template <class T>
long lanes_of(Side side, long out, long in) {
    switch (side) {
        case Side::LEFT: return out * row_lanes<T>(in);
        case Side::BACK_LEFT: return in * row_lanes<T>(out);
        default: return out * in / T::IN_LANE;
    }
}

template <class T>
void pack_right(const float* weight, long out, long in, float* to) {
    constexpr long N = T::IN_LANE;
    for (long o = 0; o < out; o += W) {
        const long start = o / PANEL * PANEL, width = std::min(PANEL, out - start);
        for (long u = 0; u < in / N; u += W) {
            // in / N need not be whole vectors: what is over is left out.
            const long lanes = std::min<long>(W, in / N - u);
            alignas(64) float rows[W * W] = {}, columns[W * W];
            for (int r = 0; r < W; r++)
                for (long e = 0; e < lanes * N; e += W) {
                    auto* row = reinterpret_cast<typename T::Number*>(rows + r * W);
                    T::put(row + e, load(weight + (o + r) * in + u * N + e));
                }
            transpose(rows, W, columns, W);
            for (long s = 0; s < lanes; s++)
                store(to + start * (in / N) + (u + s) * width + o - start, load(columns + s * W));
        }
    }
}

template <class T>
void pack_back_right(const float* weight, long out, long in, float* to) {
    constexpr long N = T::IN_LANE;
    for (long i = 0; i < in; i += W) {
        const long start = i / PANEL * PANEL, width = std::min(PANEL, in - start);
        float* panel = to + start * (out / N) + i - start;
        for (long o = 0; o < out; o += 2) {
            const float* row = weight + o * in + i;
            T::put_rows(panel + o / N * width, width, load(row), load(row + in));
        }
    }
}

// `rows` rows of `columns` numbers.
template <class T>
void pack_rows(const float* from, long row, long column, long rows, long columns, float* to) {
    for (long o = 0; o < rows; o++) {
        auto* out = reinterpret_cast<typename T::Number*>(to + o * row_lanes<T>(columns));
        for (long i = 0; i < columns; i += W) {
            alignas(64) float some[W] = {};
            for (long c = 0; c < W && i + c < columns; c++)
                some[c] = from[o * row + (i + c) * column];
            T::put(out + i, load(some));
        }
    }
}

template <class T>
void pack(Side side, const float* weight, long out, long in, float* to) {
    switch (side) {
        case Side::RIGHT: return pack_right<T>(weight, out, in, to);
        case Side::LEFT: return pack_rows<T>(weight, in, 1, out, in, to);
        case Side::BACK_RIGHT: return pack_back_right<T>(weight, out, in, to);
        case Side::BACK_LEFT: return pack_rows<T>(weight, 1, in, in, out, to);
    }
}

// Weights that are laid out together: first named, then given a place, then packed one by one.
template <class T>
struct Packing {
    struct Job {
        Side side;
        const float* weight;
        long out, in, at;
    };
    std::vector<Job> jobs;
    long lanes = 0;
    Raw memory;

    // Where it will lie, in lanes.
    long add(Side side, const float* weight, long out, long in) {
        jobs.push_back({side, weight, out, in, lanes});
        lanes += padded(lanes_of<T>(side, out, in), W);
        return jobs.back().at;
    }
    void allocate() { memory = raw(lanes); }
    const float* operator[](long at) const { return memory.get() + at; }
    void pack_one(long k) {
        const Job& j = jobs[k];
        pack<T>(j.side, j.weight, j.out, j.in, memory.get() + j.at);
    }
};

}  // namespace
