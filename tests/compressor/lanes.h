// A thread block on a CPU, so that the kernels of `compressor` can be run where there is no card: every thread is a
// coroutine, and all take turns from one meeting, a shuffle, a product or a barrier, to the next.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __constant__ static const
#define __launch_bounds__(...)

constexpr int LANES_OF_WARP = 32, MOST = 1024;

struct Index {
    int x, y;
};
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};

struct Lane {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    int meetings;
};

static Lane lanes[MOST];
static ucontext_t outside;
static Index threadIdx, blockIdx;
static Index gridDim, blockDim;
static unsigned posted[2][MOST], posted_factors[2][MOST][6];
static int threads_of_block;

using std::max, std::min;

inline void meet() {
    int own = threadIdx.x;
    swapcontext(&lanes[own].context, &outside);
    threadIdx.x = own;
}

// Where so many threads wait for each other.
struct Gate {
    int arrived, generation;
    void pass(int threads) {
        int own = generation;
        if (++arrived == threads) arrived = 0, generation++;
        while (generation == own) meet();
    }
};
static Gate of_block, of_warp[MOST / LANES_OF_WARP];
inline void __syncthreads() { of_block.pass(threads_of_block); }
inline void __syncwarp() { of_warp[threadIdx.x / LANES_OF_WARP].pass(LANES_OF_WARP); }

template <typename T> T exchanged(T x, int source) {
    unsigned(&board)[MOST] = posted[lanes[threadIdx.x].meetings++ % 2];
    std::memcpy(&board[threadIdx.x], &x, sizeof x);
    __syncwarp();
    std::memcpy(&x, &board[source], sizeof x);
    return x;
}
template <typename T> T __shfl_sync(unsigned, T x, int lane, int width) {
    return exchanged(x, threadIdx.x / width * width + lane % width);
}
template <typename T> T __shfl_xor_sync(unsigned, T x, int apart) { return exchanged(x, threadIdx.x ^ apart); }

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned chosen) {
    unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(both >> 8 * (chosen >> 4 * i & 7) & 255) << 8 * i;
    return found;
}

inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }

inline float from_half(unsigned short bits) {
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float size = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    return bits >> 15 ? -size : size;
}
inline unsigned short to_half(float x) {
    int exponent = x == 0 ? -14 : max(std::ilogb(x), -14);
    int steps = (int)std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent));
    if (steps == 2048) steps = 1024, exponent++;
    int bits = steps < 1024 ? steps : (exponent + 15) << 10 | (steps - 1024);
    return (unsigned short)((x < 0 ? 0x8000 : 0) | bits);
}
inline unsigned to_halves(float low, float high) { return to_half(low) | (unsigned)to_half(high) << 16; }
inline unsigned subtract_halves(unsigned a, unsigned b) {
    return to_halves(from_half(a) - from_half(b), from_half(a >> 16) - from_half(b >> 16));
}

using Factors = unsigned[MOST][6];
inline const Factors& posted_to_warp(const unsigned (&own)[6]) {
    auto& board = posted_factors[lanes[threadIdx.x].meetings++ % 2];
    std::memcpy(board[threadIdx.x], own, sizeof own);
    __syncwarp();
    return board;
}

// The product of 16 × 32 by 32 × 8 of a warp: bytes of the first factor are unsigned, of the second signed.
inline void multiply(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    int warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, of_four = threadIdx.x % 4;
    const Factors& board = posted_to_warp({a0, a1, a2, a3, b0, b1});
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 32; k++) {
            int holder = k % 16 / 4, byte = k % 4 * 8;
            unsigned a = board[warp + 4 * g + holder][k / 16 * 2 + i / 2] >> byte & 255;
            signed char b = board[warp + 4 * (2 * of_four + i % 2) + holder][4 + k / 16] >> byte;
            c[i] += (int)a * b;
        }
}

// The same of 16 × 16 by 16 × 8 numbers in float16.
inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    int warp = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, of_four = threadIdx.x % 4;
    const Factors& board = posted_to_warp({a[0], a[1], a[2], a[3], b0, b1});
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            int holder = k % 8 / 2, up = k % 2 * 16;
            unsigned left = board[warp + 4 * g + holder][k / 8 * 2 + i / 2] >> up;
            unsigned right = board[warp + 4 * (2 * of_four + i % 2) + holder][4 + k / 8] >> up;
            c[i] += from_half(left) * from_half(right);
        }
}

inline void prefetch(const void*, int) {}
template <typename T> T __ldg(const T* from) { return *from; }
inline unsigned __vmaxu2(unsigned a, unsigned b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
inline float __fdividef(float a, float b) { return a / b; }

static void (*body)();

inline void start() {
    body();
    lanes[threadIdx.x].done = true;
    swapcontext(&lanes[threadIdx.x].context, &outside);
}

// Run `body`, a kernel with its arguments bound, by `threads` threads of every block.
inline void launch(void (*kernel)(), int wide, int high, int threads) {
    body = kernel, gridDim = {wide, high}, blockDim = {threads, 1}, threads_of_block = threads;
    for (blockIdx.y = 0; blockIdx.y < high; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < wide; blockIdx.x++) {
            for (int i = 0; i < threads; i++) {
                lanes[i].stack.resize(1 << 17);
                lanes[i].done = false, lanes[i].meetings = 0;
                getcontext(&lanes[i].context);
                lanes[i].context.uc_stack.ss_sp = lanes[i].stack.data();
                lanes[i].context.uc_stack.ss_size = lanes[i].stack.size();
                makecontext(&lanes[i].context, start, 0);
            }
            for (bool any = true; any;) {
                any = false;
                for (int i = 0; i < threads; i++)
                    if (!lanes[i].done) {
                        threadIdx.x = i;
                        swapcontext(&outside, &lanes[i].context);
                        any = true;
                    }
            }
        }
}
