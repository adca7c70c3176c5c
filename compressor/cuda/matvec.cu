// One token times packed matrices that share it, y = Q·x + L·h: compiled by NVRTC, launched by `matvec_cuda.py`.
//
// The stored layout is `packing.py`'s. A launch has up to SEGMENTS matrices of as many columns, whose rows follow each
// other in y. A tile is 16 rows of one, a unit 256 columns of a tile. A thread block, one or two on a multiprocessor,
// takes every gridDim.x-th tile; its warps multiply units, one after the other, and meet when a round of tiles is done,
// so many that four threads have a row to add up. While one waits for memory others multiply. In the end what later
// launches read is asked for, so that memory does not rest between them. Of few rows several thread blocks, gridDim.y,
// have a share of the columns each, and y has as many parts.
//
// The arithmetic is the tensor core's of 8-bit integers, and exact. x is rounded once to 16 bits of the largest in its
// chunk of 64 columns, x = scale (256 high + low), and codes are what they are. In the product of 16 × 32 by 32 × 8, lane
// (g, c), g = 0 … 7 and c = 0 … 3, has codes of rows g and g + 8 in chunk c. Its part of the second factor is not zero only
// in columns 2 c, high, and 2 c + 1, low, so that the two numbers of either row which the core gives the lane are the
// products of its chunk, and no other lane's. Zero points are taken off with the sum of x, of integers too.
//
// A register holds the codes t, 8 + t, 16 + t, 24 + t of a run of 32 columns, t = 0 … 7, one a byte, for that is the
// order which all widths of plane yield with the fewest instructions; x lies in shared memory in the same order.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int WARPS = 32, SEGMENTS = 4;  // the most
constexpr int RUN = 32, CHUNK = 64, UNIT = 4 * CHUNK, TILE = 16;
constexpr int INPUTS = 36;  // words of shared memory for a chunk's x: 16 high, 16 low, scale, both runs' sums, one free
constexpr int FLOAT = 0, BFLOAT16 = 1;
constexpr u32 ALL = ~0u;

struct Segment {
    const u32* words;
    const u16* scale;
    const u8* zero;
    int rows, bits, group;
    const void* left;
    const u16* left_scale;
    const u8* left_zero;
    const float* hidden;
    int hidden_parts, rank, factor_bits;
    int first_tile, first_row, groups, groups_a_chunk;  // groups_a_chunk in 65536ths
};

struct alignas(16) Four {
    u32 of[4];
};
struct alignas(8) Two {
    u32 of[2];
};

extern __shared__ u32 shared[];

#ifdef __CUDACC__
__device__ float from_half(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
__device__ u16 to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
__device__ void prefetch(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}
__device__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

__device__ float to_float(u16 x, int kind) { return kind == BFLOAT16 ? __uint_as_float((u32)x << 16) : from_half(x); }

__device__ u16 to_bfloat16(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Columns 16 i to 16 i + 15 of x, as they are stored.
struct Sixteen {
    Four half[2];
};
__device__ Sixteen columns_of(const u16* x, int i, int columns) {
    if (i * 16 >= columns) return {};
    return {((const Four*)x)[2 * i], ((const Four*)x)[2 * i + 1]};
}

__device__ void store(void* y, int kind, int place, float x) {
    if (kind == FLOAT)
        ((float*)y)[place] = x;
    else
        ((u16*)y)[place] = kind == BFLOAT16 ? to_bfloat16(x) : to_half(x);
}

// x to integers, 16 columns a thread, so that four neighbouring threads have a chunk; zeros up to a whole unit.
// Adding 1.5 · 2²³ leaves a rounded number in the low bits of a float.
__device__ void share_inputs(const u16* x, int kind, int columns) {
    constexpr float TO_INTEGER = 12582912;
    int needed = (columns + UNIT - 1) / UNIT * (UNIT / 16), odd = threadIdx.x % 2;
    Sixteen later = columns_of(x, threadIdx.x, columns);
    for (int i = threadIdx.x; i < (needed + 31) / 32 * 32; i += blockDim.x) {
        Sixteen now = later;
        later = columns_of(x, i + blockDim.x, columns);
        float value[16];
        u32 largest = 0;
#pragma unroll
        for (int k = 0; k < 16; k++) {
            value[k] = to_float(now.half[k / 8].of[k % 8 / 2] >> 16 * (k % 2), kind);
            largest = max(largest, __float_as_uint(value[k]) & 0x7fffffffu);
        }
        largest = max(largest, __shfl_xor_sync(ALL, largest, 1));
        largest = max(largest, __shfl_xor_sync(ALL, largest, 2));
        float most = __uint_as_float(largest), steps = most > 1e-30f ? __fdividef(32639, most) : 0;
        u32 sum = 0, bytes[8];  // high and low ones of columns t and 8 + t
#pragma unroll
        for (int t = 0; t < 8; t++) {
            u32 first = __float_as_uint(fmaf(value[t], steps, TO_INTEGER));
            u32 second = __float_as_uint(fmaf(value[8 + t], steps, TO_INTEGER));
            sum += first + second - 2 * __float_as_uint(TO_INTEGER);
            u32 high = __byte_perm(first + 128, second + 128, 0x51), low = __byte_perm(first, second, 0x40);
            bytes[t] = __byte_perm(high, low, 0x5410);
        }
        sum += __shfl_xor_sync(ALL, sum, 1);
        Four high, low;  // half of them, of the neighbour's columns too
#pragma unroll
        for (int t = 0; t < 4; t++) {
            u32 own = odd ? bytes[4 + t] : bytes[t], other = __shfl_xor_sync(ALL, odd ? bytes[t] : bytes[4 + t], 1);
            high.of[t] = odd ? __byte_perm(other, own, 0x5410) : __byte_perm(own, other, 0x5410);
            low.of[t] = odd ? __byte_perm(other, own, 0x7632) : __byte_perm(own, other, 0x7632);
        }
        if (i >= needed) continue;
        u32* chunk = shared + i / 4 * INPUTS;
        int place = i / 2 % 2 * 8 + odd * 4;
        *(Four*)(chunk + place) = high;
        *(Four*)(chunk + 16 + place) = low;
        if (i % 4 == 0) chunk[32] = __float_as_uint(most / 32639);
        if (!odd) chunk[33 + i / 2 % 2] = sum;
    }
}

__device__ const Segment& segment_of(const Segment* segments, int tile) {
    int found = 0;
#pragma unroll
    for (int i = 1; i < SEGMENTS; i++) found += tile >= segments[i].first_tile;
    return segments[found];
}

// A chunk's words of one plane, a run at a time, and of them the codes t, 8 + t, 16 + t and 24 + t, at `up` in their bytes.
template <int WIDTH> struct Plane {
    u32 raw[2 * WIDTH], word[2][WIDTH];
    __device__ void load(const u32* from) {
        if (WIDTH == 1) *(Two*)raw = *(const Two*)from;
        if (WIDTH == 2) *(Four*)raw = *(const Four*)from;
        if (WIDTH == 4) *(Four*)raw = *(const Four*)from, *(Four*)(raw + 4) = ((const Four*)from)[1];
    }
    __device__ void gather() {
#pragma unroll
        for (int run = 0; run < 2; run++) {
            const u32* of = raw + run * WIDTH;
            if (WIDTH == 1) word[run][0] = of[0];
            if (WIDTH == 2)
                word[run][0] = __byte_perm(of[0], of[1], 0x6420), word[run][1] = __byte_perm(of[0], of[1], 0x7531);
            if (WIDTH == 4) {
                u32 a = __byte_perm(of[0], of[1], 0x5140), b = __byte_perm(of[2], of[3], 0x5140);
                u32 c = __byte_perm(of[0], of[1], 0x7362), d = __byte_perm(of[2], of[3], 0x7362);
                word[run][0] = __byte_perm(a, b, 0x5410), word[run][1] = __byte_perm(a, b, 0x7632);
                word[run][2] = __byte_perm(c, d, 0x5410), word[run][3] = __byte_perm(c, d, 0x7632);
            }
        }
    }
    __device__ u32 codes(int run, int t, int up) const {
        constexpr int HELD = 8 / WIDTH;
        int shift = t % HELD * WIDTH - up;
        u32 source = word[run][t / HELD], mask = ((1u << WIDTH) - 1) * 0x01010101u << up;
        return (shift > 0 ? source >> shift : source << -shift) & mask;
    }
};
template <> struct Plane<0> {
    __device__ void load(const u32*) {}
    __device__ void gather() {}
    __device__ u32 codes(int, int, int) const { return 0; }
};

// Add the products of 256 columns to the sums of rows g and g + 8; x is shared from the unit `first_unit` on.
template <int LOW, int HIGH>
__device__ void add(
    float (&sum)[2], const Segment& segment, int tile, int unit, int first_unit, int columns, int lane
) {
    int chunk = min(4 * unit + lane % 4, columns / CHUNK - 1), first = chunk * segment.groups_a_chunk >> 16;
    int top = (tile - segment.first_tile) * TILE + lane / 4, stride = columns / RUN * (LOW + HIGH);
    int next = segment.group == RUN;
    Plane<LOW> low[2];
    Plane<HIGH> high[2];
    u16 scale[2][2];
    u8 zero[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = min(top + 8 * i, segment.rows - 1), at = row * segment.groups + first;
        const u32* words = segment.words + (long long)row * stride;
        low[i].load(words + chunk * 2 * LOW);
        high[i].load(words + columns / RUN * LOW + chunk * 2 * HIGH);
#pragma unroll
        for (int run = 0; run < 2; run++)
            scale[i][run] = segment.scale[at + run * next], zero[i][run] = segment.zero[at + run * next];
    }
#pragma unroll
    for (int i = 0; i < 2; i++) low[i].gather(), high[i].gather();
    const u32* input = shared + (4 * (unit - first_unit) + lane % 4) * INPUTS;
    const u32* piece = input + lane / 4 % 2 * 16;
    bool own = lane / 8 == lane % 4;
    int c[2][4] = {};
#pragma unroll
    for (int quarter = 0; quarter < 2; quarter++)
#pragma unroll
        for (int run = 0; run < 2; run++) {
            Four x = {};
            if (own) x = *(const Four*)(piece + run * 8 + quarter * 4);
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
                u32 a[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int t = 4 * quarter + k + i / 2;
                    a[i] = low[i % 2].codes(run, t, 0) | high[i % 2].codes(run, t, LOW);
                }
                multiply(c[run], a[0], a[1], a[2], a[3], x.of[k], x.of[k + 1]);
            }
        }
    Four about = *(const Four*)(input + 32);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float of_row = 0;
#pragma unroll
        for (int run = 0; run < 2; run++) {
            int product = 256 * c[run][2 * i] + c[run][2 * i + 1] - zero[i][run] * (int)about.of[1 + run];
            of_row = fmaf(__uint_as_float((u32)scale[i][run] << 16), (float)product, of_row);
        }
        sum[i] = fmaf(__uint_as_float(about.of[0]), of_row, sum[i]);
    }
}

__device__ void add_unit(
    float (&sum)[2], const Segment& segment, int tile, int unit, int first_unit, int columns, int lane
) {
    switch (segment.bits) {
        case 2: return add<2, 0>(sum, segment, tile, unit, first_unit, columns, lane);
        case 3: return add<2, 1>(sum, segment, tile, unit, first_unit, columns, lane);
        case 4: return add<4, 0>(sum, segment, tile, unit, first_unit, columns, lane);
        case 5: return add<4, 1>(sum, segment, tile, unit, first_unit, columns, lane);
        case 6: return add<4, 2>(sum, segment, tile, unit, first_unit, columns, lane);
        case 8: return add<4, 4>(sum, segment, tile, unit, first_unit, columns, lane);
    }
}

// Of L·h one row, and of that every fourth vector; L is stored as its transpose.
__device__ float low_rank(const Segment& segment, int row, int first) {
    float sum = 0;
    int runs = (segment.rows + RUN - 1) / RUN, groups = (segment.rows + 63) / 64, bits = segment.factor_bits;
#pragma unroll 4
    for (int vector = first; vector < segment.rank; vector += 4) {
        float hidden = 0;
        for (int part = 0; part < segment.hidden_parts; part++)
            hidden += segment.hidden[vector * segment.hidden_parts + part];
        if (bits == 16) {
            sum += hidden * to_float(((const u16*)segment.left)[(long long)vector * segment.rows + row], BFLOAT16);
            continue;
        }
        const u32* line = (const u32*)segment.left + (long long)vector * runs * bits;
        u32 code = line[row / 8] >> 4 * (row % 8) & 15;
        if (bits == 8) code |= (line[4 * runs + row / 8] >> 4 * (row % 8) & 15) << 4;
        int group = vector * groups + row / 64;
        sum += hidden * to_float(segment.left_scale[group], BFLOAT16) * ((float)code - segment.left_zero[group]);
    }
    return sum;
}

// Have some bytes brought to the L2 cache, each thread block its share.
__device__ void read_ahead(const char* from, int bytes) {
    constexpr int SHARE = 8192;
    for (int at = blockIdx.x * SHARE; at < bytes; at += gridDim.x * SHARE) prefetch(from + at, min(SHARE, bytes - at));
}

#define ARGUMENTS(n)                                                                                                \
    const u32 *words##n, const u16 *scale##n, const u8 *zero##n, int rows##n, int bits##n, int group##n,            \
        const void *left##n, const u16 *left_scale##n, const u8 *left_zero##n, const float *hidden##n,              \
        int hidden_parts##n, int rank##n, int factor_bits##n, int first_tile##n, int first_row##n, int groups##n,   \
        int groups_a_chunk##n
#define SEGMENT(n)                                                                                                   \
    if (threadIdx.x == blockDim.x - 32 * (n + 1))                                                                    \
        segments[n] = {words##n, scale##n,     zero##n,   rows##n, bits##n,        group##n, left##n, left_scale##n, \
                       left_zero##n, hidden##n, hidden_parts##n, rank##n, factor_bits##n, first_tile##n,             \
                       first_row##n, groups##n, groups_a_chunk##n};
#define LATER(n) const char *later##n, int bytes##n
#define AHEAD(n) \
    if (lane == n) later = later##n, bytes = bytes##n;

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) matvec(
    const u16* x, int x_kind, int columns, void* y, int y_kind, int tiles,
    ARGUMENTS(0), ARGUMENTS(1), ARGUMENTS(2), ARGUMENTS(3),
    LATER(0), LATER(1), LATER(2), LATER(3), LATER(4), LATER(5),
    LATER(6), LATER(7), LATER(8), LATER(9), LATER(10), LATER(11)
) {
    __shared__ Segment segments[SEGMENTS];
    __shared__ float parts[WARPS][WARPS / 2 * TILE + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int all_units = (columns + UNIT - 1) / UNIT, first_unit = blockIdx.y * all_units / gridDim.y;
    int units = (blockIdx.y + 1) * all_units / gridDim.y - first_unit;
    SEGMENT(0) SEGMENT(1) SEGMENT(2) SEGMENT(3)
    bool ranked = rank0 + rank1 + rank2 + rank3 > 0;
    int blocks = gridDim.x, round = warps / 2, mine = threadIdx.x / 4;
    share_inputs(x + first_unit * UNIT, x_kind, min(columns - first_unit * UNIT, units * UNIT));
    __syncthreads();
    for (int first = blockIdx.x; first < tiles; first += round * blocks) {
        int left = min(round, (tiles - first + blocks - 1) / blocks);
        bool last = first + round * blocks >= tiles;
        for (int i = lane; i < left * TILE; i += 32) parts[warp][i] = 0;
        __syncwarp();
        for (int k = warp / units, unit = warp % units; k < left;) {
            int tile = first + k * blocks;
            float sum[2] = {};
            add_unit(sum, segment_of(segments, tile), tile, first_unit + unit, first_unit, columns, lane);
            float half = lane % 2 ? sum[1] : sum[0];
            half += __shfl_xor_sync(ALL, lane % 2 ? sum[0] : sum[1], 1);
            half += __shfl_xor_sync(ALL, half, 2);
            if (lane % 4 < 2) parts[warp][k * TILE + lane % 2 * 8 + lane / 4] += half;
            __syncwarp();
            for (unit += warps; unit >= units; unit -= units) k++;
        }
        if (warp == warps - 1 && last) {
            const char* later = nullptr;
            int bytes = 0;
            AHEAD(0) AHEAD(1) AHEAD(2) AHEAD(3) AHEAD(4) AHEAD(5)
            AHEAD(6) AHEAD(7) AHEAD(8) AHEAD(9) AHEAD(10) AHEAD(11)
            read_ahead(later, bytes);
        }
        int tile = first + mine / TILE * blocks;
        const Segment& segment = segment_of(segments, tile);
        int row = (tile - segment.first_tile) * TILE + mine % TILE;
        bool real = mine < left * TILE && row < segment.rows;
        float total = ranked && real ? low_rank(segment, row, threadIdx.x % 4) : 0;
        __syncthreads();
        for (int w = threadIdx.x % 4; real && w < warps; w += 4) total += parts[w][mine];
        total += __shfl_xor_sync(ALL, total, 1);
        total += __shfl_xor_sync(ALL, total, 2);
        if (real && threadIdx.x % 4 == 0) store(y, y_kind, (segment.first_row + row) * gridDim.y + blockIdx.y, total);
        if (!last) __syncthreads();
    }
}
