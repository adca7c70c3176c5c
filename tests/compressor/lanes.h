// A thread block on a CPU, so that `compressor/gptq.cu` can be run where there is no card: every thread is a coroutine,
// and all take turns from one meeting, a shuffle or a barrier, to the next.

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

constexpr int LANES_OF_WARP = 32, MOST = 128;

struct Index {
    int x, y;
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
static unsigned posted[2][MOST];
static float shared[128 * 128];

using std::max, std::min;

inline void meet() {
    int own = threadIdx.x;
    swapcontext(&lanes[own].context, &outside);
    threadIdx.x = own;
}
inline void __syncwarp() { meet(); }
inline void __syncthreads() { meet(); }

template <typename T> T exchanged(T x, int source) {
    unsigned(&board)[MOST] = posted[lanes[threadIdx.x].meetings++ % 2];
    std::memcpy(&board[threadIdx.x], &x, sizeof x);
    meet();
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

static void (*body)();

inline void start() {
    body();
    lanes[threadIdx.x].done = true;
    swapcontext(&lanes[threadIdx.x].context, &outside);
}

// Run `body`, a kernel with its arguments bound, by `threads` threads of every block.
inline void launch(void (*kernel)(), int wide, int high, int threads) {
    body = kernel;
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

inline unsigned short half_of(float x) {
    int exponent = x == 0 ? -14 : max(std::ilogb(x), -14);
    int steps = (int)std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent));
    if (steps == 2048) steps = 1024, exponent++;
    int bits = steps < 1024 ? steps : (exponent + 15) << 10 | (steps - 1024);
    return (unsigned short)((x < 0 ? 0x8000 : 0) | bits);
}
