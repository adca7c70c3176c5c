// A block of 128 columns of GPTQ, or of descent, in one kernel. NVRTC compiles it, `gptq_cuda.py` launches it.
//
// Eight lanes hold a row, and every thread four rows: columns 8 j + lane of the block, j = 0 … 15, so that a leaf of 32
// columns is shared out evenly. Registers cannot be indexed by what is not known when compiling, and a loop that is
// unrolled whole does not fit the cache of instructions; so what a lane holds is rotated until the column at hand is at
// j = 0: by one within the leaf after every eight columns (`turn`), by a leaf after every leaf (`rotate`). A column's change
// goes to the other lanes by shuffle, and onto all columns by multiplication with a row of the block's matrix, which lies
// in shared memory in the order in which lanes read it, [column][j / 4][lane][j % 4]: four rows to a thread, because that
// reading would bound it.
//
// A row never depends on another row. Rows beyond the last, and columns beyond `columns`, are zeros that nothing moves.
// Defined when this is compiled: SETTLE or ROUND_BLOCK, SHRINKS, the eight fractions of the range that the grid search
// tries, and REFITS.

constexpr int BLOCK = 128, LEAF = 32, LEAVES = BLOCK / LEAF, LANES = 8, OWN = BLOCK / LANES, TURN = LEAF / LANES;
constexpr int HEIGHT = 4, THREADS = 128, ROWS = THREADS / LANES * HEIGHT, TRIALS = 2;
constexpr unsigned ALL = ~0u;
constexpr float TINY = 1e-30f, SMALLEST = 1.17549435e-38f;
static_assert(TURN == 4, "a leaf is one float4 of every lane");

extern __shared__ float shared[];

__constant__ float shrinks[] = {SHRINKS};
static_assert(sizeof(shrinks) / sizeof(float) == LANES, "a lane tries one fraction of the range");

// The four rows of a thread; `aligned` where they can be read and written at once.
struct Rows {
    int lane, start, count;
    bool aligned;
    __device__ Rows(int rows, int stride) {
        int first = blockIdx.x * ROWS + threadIdx.x / LANES * HEIGHT;
        lane = threadIdx.x % LANES;
        start = blockIdx.y * rows + first;
        count = max(0, min(HEIGHT, rows - first));
        aligned = rows % HEIGHT == 0 && stride % HEIGHT == 0;
    }
};

template <typename T> struct alignas(sizeof(T) * HEIGHT) Four {
    T of[HEIGHT];
};

template <typename T> __device__ Four<T> fetched(const T* from, const Rows& rows) {
    if (rows.aligned && rows.count) return *(const Four<T>*)from;
    Four<T> found = {};
#pragma unroll
    for (int i = 0; i < HEIGHT; i++)
        if (i < rows.count) found.of[i] = from[i];
    return found;
}

template <typename T> __device__ void store(T* onto, const Four<T>& x, const Rows& rows) {
    if (rows.aligned && rows.count) {
        *(Four<T>*)onto = x;
        return;
    }
#pragma unroll
    for (int i = 0; i < HEIGHT; i++)
        if (i < rows.count) onto[i] = x.of[i];
}

__device__ float storable(float x) {
    unsigned bits = __float_as_uint(x);
    return fmaxf(__uint_as_float((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u), SMALLEST);
}

#ifdef __CUDACC__
__device__ unsigned short to_half(float x) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
#endif

// The nearest whole number, ties to even, of what is clamped to ±2²² afterwards; rintf takes eight times as long.
__device__ float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

__device__ float summed(float x) {
#pragma unroll
    for (int apart = 1; apart < LANES; apart *= 2) x += __shfl_xor_sync(ALL, x, apart);
    return x;
}

__device__ float largest(float x) {
#pragma unroll
    for (int apart = 1; apart < LANES; apart *= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, apart));
    return x;
}

template <int TURNED, typename T, int N> __device__ void rotate(T (&x)[N]) {
    T first[TURNED];
#pragma unroll
    for (int j = 0; j < TURNED; j++) first[j] = x[j];
#pragma unroll
    for (int j = 0; j < N - TURNED; j++) x[j] = x[j + TURNED];
#pragma unroll
    for (int j = 0; j < TURNED; j++) x[N - TURNED + j] = first[j];
}

template <int N> __device__ void rotate(float (&x)[HEIGHT][N]) {
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) rotate<TURN>(x[i]);
}

template <int N> __device__ void turn(float (&x)[HEIGHT][N]) {
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        float first = x[i][0];
#pragma unroll
        for (int j = 0; j < TURN - 1; j++) x[i][j] = x[i][j + 1];
        x[i][TURN - 1] = first;
    }
}

__device__ int place_of(int column, int other) {
    int j = other / LANES;
    return column * BLOCK + (j / 4 * LANES + other % LANES) * 4 + j % 4;
}

// The block's matrix, one on the diagonal where it has no columns, and the inverse of its diagonal.
__device__ void share(float* inverse, const float* matrix, int down, int right, int columns) {
#pragma unroll 16
    for (int i = threadIdx.x; i < BLOCK * BLOCK; i += THREADS) {
        int column = i / BLOCK, other = i % BLOCK;
        bool there = column < columns && other < columns;
        float value = there ? matrix[column * down + other * right] : column == other;
        shared[place_of(column, other)] = value;
        if (column == other) inverse[column] = 1.0f / value;
    }
    __syncthreads();
}

// onto[i][j] += by[i] · matrix[column, column of j], of the `count` leaves from the one at hand on, itself turned.
__device__ void spread(
    float (&onto)[HEIGHT][OWN], const float (&by)[HEIGHT], int column, int leaf, int turned, int lane, int count
) {
    const float* at_hand = shared + column * BLOCK + (leaf * LANES + lane) * 4;
#pragma unroll
    for (int j = 0; j < TURN; j++) {
        float m = at_hand[(j + turned) % TURN];
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) onto[i][j] = fmaf(m, by[i], onto[i][j]);
    }
    const float4* row = (const float4*)(shared + column * BLOCK);
#pragma unroll
    for (int k = 1; k < LEAVES; k++) {
        if (k >= count) break;
        float4 m = row[(k + leaf) % LEAVES * LANES + lane];
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            onto[i][4 * k] = fmaf(m.x, by[i], onto[i][4 * k]);
            onto[i][4 * k + 1] = fmaf(m.y, by[i], onto[i][4 * k + 1]);
            onto[i][4 * k + 2] = fmaf(m.z, by[i], onto[i][4 * k + 2]);
            onto[i][4 * k + 3] = fmaf(m.w, by[i], onto[i][4 * k + 3]);
        }
    }
}

#ifdef SETTLE

// Codes of one row, four to a register: those of a leaf. 2²³ + code has the code in its lowest byte.
struct Codes {
    unsigned packed[LEAVES];
    __device__ float get(int j) const {
        return __uint_as_float(__byte_perm(packed[j / 4], 0x4B000000u, 0x7650 + j % 4)) - 8388608.0f;
    }
    __device__ void put(int j, float code) {
        constexpr unsigned chosen[] = {0x3214, 0x3240, 0x3410, 0x4210};
        packed[j / 4] = __byte_perm(packed[j / 4], __float_as_uint(code + 8388608.0f), chosen[j % 4]);
    }
};

__device__ void turn(Codes (&code)[HEIGHT]) {
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) code[i].packed[0] = __byte_perm(code[i].packed[0], 0, 0x0321);
}

__device__ void rotate(Codes (&code)[HEIGHT]) {
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) rotate<1>(code[i].packed);
}

// Of the rows of a thread block, in shared memory.
struct Grids {
    float scale[LEAVES][ROWS], zero[LEAVES][ROWS];
};

__device__ void move_codes(
    float (&pull)[HEIGHT][OWN], Codes (&code)[HEIGHT], const Grids& grids, float maximum, const float* inverse,
    int lane, int own
) {
    for (int leaf = 0; leaf < LEAVES; leaf++) {
        float scale[HEIGHT], per_scale[HEIGHT];
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) scale[i] = grids.scale[leaf][own + i], per_scale[i] = 1.0f / scale[i];
        for (int turned = 0; turned < TURN; turned++) {
#pragma unroll 2
            for (int owner = 0; owner < LANES; owner++) {
                int column = leaf * LEAF + turned * LANES + owner;
                float change[HEIGHT], per_diagonal = inverse[column];
#pragma unroll
                for (int i = 0; i < HEIGHT; i++) {
                    float before = code[i].get(0), wanted = before + pull[i][0] * per_diagonal * per_scale[i];
                    float moved = fminf(fmaxf(nearest(wanted), 0.0f), maximum);
                    change[i] = __shfl_sync(ALL, (before - moved) * scale[i], owner, LANES);
                    if (lane == owner) code[i].put(0, moved);
                }
                spread(pull, change, column, leaf, turned, lane, LEAVES);
            }
            turn(pull);
            turn(code);
        }
        rotate(pull);
        rotate(code);
    }
}

__device__ void move_scales(
    float (&pull)[HEIGHT][OWN], Codes (&code)[HEIGHT], Grids& grids, int leaves, int lane, int own
) {
    for (int group = 0; group < LEAVES; group += leaves) {
        float onto[HEIGHT][OWN] = {}, zero[HEIGHT];
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) zero[i] = grids.zero[group][own + i];
        for (int leaf = group; leaf < group + leaves; leaf++) {
            for (int turned = 0; turned < TURN; turned++) {
#pragma unroll 2
                for (int owner = 0; owner < LANES; owner++) {
                    float level[HEIGHT];
#pragma unroll
                    for (int i = 0; i < HEIGHT; i++)
                        level[i] = __shfl_sync(ALL, code[i].get(0) - zero[i], owner, LANES);
                    spread(onto, level, leaf * LEAF + turned * LANES + owner, leaf, turned, lane, LEAVES);
                }
                turn(onto);
                turn(code);
            }
            rotate(pull);
            rotate(onto);
            rotate(code);
        }
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            float slope = 0, curve = 0, now = grids.scale[group][own + i];
#pragma unroll
            for (int j = 0; j < OWN; j++) {
                if (j < OWN - leaves * TURN) continue;
                float level = code[i].get(j) - zero[i];
                slope = fmaf(pull[i][j], level, slope);
                curve = fmaf(onto[i][j], level, curve);
            }
            slope = summed(slope), curve = summed(curve);
            float wanted = now + slope / fmaxf(curve, TINY);
            float step = storable(fmaxf(wanted, TINY)) - now;
            if (!(step * (2 * slope - step * curve) > 0 && wanted > TINY)) step = 0;
#pragma unroll
            for (int j = 0; j < OWN; j++) pull[i][j] = fmaf(-onto[i][j], step, pull[i][j]);
            __syncwarp();
            if (group <= lane && lane < group + leaves) grids.scale[lane][own + i] = now + step;
        }
    }
}

// Codes, scales and codes again; change, in float16, is 2^exponent times what was added to Q.
extern "C" __global__ void __launch_bounds__(THREADS, 3) settle(
    float* pull_IR, unsigned short* change_IR, unsigned char* code_IR, float* scale_SR, const float* zero_SR,
    const float* damped_II, const float* maximum_P, const int* leaves_P, int exponent, int rows, int stride, int down,
    int right, int start, int columns
) {
    __shared__ float inverse[BLOCK];
    long before_it = (long)start * stride;
    pull_IR += before_it, change_IR += before_it, code_IR += before_it, damped_II += (long)start * (down + right);
    scale_SR += start / LEAF * stride, zero_SR += start / LEAF * stride;
    share(inverse, damped_II, down, right, columns);
    Rows row(rows, stride);
    __shared__ Grids grids;
    int own = threadIdx.x / LANES * HEIGHT, leaves = leaves_P[blockIdx.y];
    float pull[HEIGHT][OWN], maximum = maximum_P[blockIdx.y];
    Codes code[HEIGHT] = {};
    if (row.lane < LEAVES) {
        bool there = row.lane * LEAF < columns;
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            int place = row.lane * stride + row.start + i;
            grids.scale[row.lane][own + i] = there && i < row.count ? scale_SR[place] : 1;
            grids.zero[row.lane][own + i] = there && i < row.count ? zero_SR[place] : 0;
        }
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        int column = LANES * j + row.lane, place = column * stride + row.start;
        Four<float> pulls = {};
        Four<unsigned char> codes = {};
        if (column < columns) pulls = fetched(pull_IR + place, row), codes = fetched(code_IR + place, row);
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            pull[i][j] = pulls.of[i];
            code[i].put(j, column < columns ? codes.of[i] : grids.zero[j / TURN / leaves * leaves][own + i]);
        }
    }
    __syncwarp();
    move_codes(pull, code, grids, maximum, inverse, row.lane, own);
    move_scales(pull, code, grids, leaves, row.lane, own);
    __syncwarp();
    move_codes(pull, code, grids, maximum, inverse, row.lane, own);
    float by = ldexpf(1.0f, exponent);
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        int column = LANES * j + row.lane, l = j / TURN, place = column * stride + row.start;
        if (column >= columns) continue;
        Four<float> scales = fetched(scale_SR + l * stride + row.start, row), pulls;
        Four<unsigned char> codes = fetched(code_IR + place, row);
        Four<unsigned short> changes;
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) {
            float zero = grids.zero[l][own + i], before = (codes.of[i] - zero) * scales.of[i];
            changes.of[i] = to_half(((code[i].get(j) - zero) * grids.scale[l][own + i] - before) * by);
            codes.of[i] = (unsigned char)code[i].get(j);
            pulls.of[i] = pull[i][j];
        }
        store(change_IR + place, changes, row);
        store(code_IR + place, codes, row);
        store(pull_IR + place, pulls, row);
    }
    __syncwarp();
    if (row.lane < LEAVES && row.lane * LEAF < columns)
        for (int i = 0; i < row.count; i++)
            scale_SR[row.lane * stride + row.start + i] = grids.scale[row.lane][own + i];
}

#endif
#ifdef ROUND_BLOCK

struct Grid {
    float scale, zero;
};

__device__ float levelled(float w, float per_scale, float zero, float maximum) {
    return fminf(fmaxf(nearest(w * per_scale), -zero), maximum - zero);
}

// `grid.search_grid` of a group that starts at the leaf at hand: every lane tries one fraction of the range.
__device__ void search(
    Grid (&grid)[HEIGHT], float (&w)[HEIGHT][OWN], float maximum, const float* inverse, int group, int leaves, int lane
) {
    float low[HEIGHT], scale[HEIGHT], zero[HEIGHT], loss[HEIGHT][TRIALS] = {};
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        float high = 0;
        low[i] = 0;
#pragma unroll
        for (int j = 0; j < OWN; j++)
            if (j < leaves * TURN) low[i] = fmaxf(low[i], -w[i][j]), high = fmaxf(high, w[i][j]);
        low[i] = -largest(low[i]);
        float span = fmaxf(largest(high) - low[i], TINY) * shrinks[lane];
        scale[i] = storable(span / maximum);
        zero[i] = floorf(-low[i] * shrinks[lane] / scale[i]);
    }
    for (int leaf = 0; leaf < LEAVES; leaf++) {
        if (leaf < leaves) {
            float per_scale[HEIGHT];
#pragma unroll
            for (int i = 0; i < HEIGHT; i++) per_scale[i] = 1.0f / scale[i];
            for (int turned = 0; turned < TURN; turned++) {
#pragma unroll 2
                for (int owner = 0; owner < LANES; owner++) {
                    float per_diagonal = inverse[(group + leaf) * LEAF + turned * LANES + owner];
#pragma unroll
                    for (int i = 0; i < HEIGHT; i++) {
                        float theirs = __shfl_sync(ALL, w[i][0], owner, LANES);
#pragma unroll
                        for (int t = 0; t < TRIALS; t++) {
                            float trial = fminf(fmaxf(zero[i] + t, 0.0f), maximum);
                            float level = levelled(theirs, per_scale[i], trial, maximum);
                            float error = (level * scale[i] - theirs) * per_diagonal;
                            loss[i][t] = fmaf(error, error, loss[i][t]);
                        }
                    }
                }
                turn(w);
            }
        }
        rotate(w);
    }
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        bool above = loss[i][1] < loss[i][0];
        float best = above ? loss[i][1] : loss[i][0];
        grid[i].scale = scale[i];
        grid[i].zero = fminf(fmaxf(zero[i] + above, 0.0f), maximum);
        int winner = lane;
#pragma unroll
        for (int apart = 1; apart < LANES; apart *= 2) {
            float other = __shfl_xor_sync(ALL, best, apart);
            int its = __shfl_xor_sync(ALL, winner, apart);
            if (other < best || (other == best && its < winner)) best = other, winner = its;
        }
        grid[i].scale = __shfl_sync(ALL, grid[i].scale, winner, LANES);
        grid[i].zero = __shfl_sync(ALL, grid[i].zero, winner, LANES);
        for (int refit = 0; refit < REFITS; refit++) {
            float norm = 0, product = 0, missed = 0, per_scale = 1.0f / grid[i].scale;
#pragma unroll
            for (int j = 0; j < OWN; j++) {
                if (j >= leaves * TURN) break;
                float weight = inverse[group * LEAF + LANES * j + lane];
                float level = levelled(w[i][j], per_scale, grid[i].zero, maximum) * weight * weight;
                norm = fmaf(level, levelled(w[i][j], per_scale, grid[i].zero, maximum), norm);
                product = fmaf(level, w[i][j], product);
            }
            norm = summed(norm), product = summed(product);
            float trial = norm > 0 && product > 0 ? storable(product / fmaxf(norm, TINY)) : grid[i].scale;
            per_scale = 1.0f / trial;
#pragma unroll
            for (int j = 0; j < OWN; j++) {
                if (j >= leaves * TURN) break;
                float level = levelled(w[i][j], per_scale, grid[i].zero, maximum);
                float error = (level * trial - w[i][j]) * inverse[group * LEAF + LANES * j + lane];
                missed = fmaf(error, error, missed);
            }
            missed = summed(missed);
            if (missed < best) best = missed, grid[i].scale = trial;
        }
    }
}

// Grids searched, columns rounded; error, in float16, is 2^exponent times each column's over the factor's diagonal.
extern "C" __global__ void __launch_bounds__(THREADS, 3) round_block(
    const float* w_IR, unsigned short* error_IR, unsigned char* code_IR, float* scale_SR, float* zero_SR,
    const float* factor_II, const float* maximum_P, const int* leaves_P, int exponent, int rows, int stride, int down,
    int right, int start, int columns
) {
    __shared__ float inverse[BLOCK];
    long before_it = (long)start * stride;
    w_IR += before_it, error_IR += before_it, code_IR += before_it, factor_II += (long)start * (down + right);
    scale_SR += start / LEAF * stride, zero_SR += start / LEAF * stride;
    share(inverse, factor_II, down, right, columns);
    Rows row(rows, stride);
    float w[HEIGHT][OWN], maximum = maximum_P[blockIdx.y], by = ldexpf(1.0f, exponent);
    int leaves = leaves_P[blockIdx.y];
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        int column = LANES * j + row.lane;
        Four<float> weights = {};
        if (column < columns) weights = fetched(w_IR + column * stride + row.start, row);
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) w[i][j] = weights.of[i];
    }
    Grid grid[HEIGHT];
    for (int leaf = 0; leaf < LEAVES && leaf * LEAF < columns; leaf++) {
        if (leaf % leaves == 0) {
            search(grid, w, maximum, inverse, leaf, leaves, row.lane);
#pragma unroll
            for (int i = 0; i < HEIGHT; i++)
                if (row.lane == i && i < row.count) {
                    scale_SR[leaf * stride + row.start + i] = grid[i].scale;
                    zero_SR[leaf * stride + row.start + i] = grid[i].zero;
                }
        }
        float own_error[HEIGHT][TURN], own_code[HEIGHT][TURN], per_scale[HEIGHT];
#pragma unroll
        for (int i = 0; i < HEIGHT; i++) per_scale[i] = 1.0f / grid[i].scale;
        for (int turned = 0; turned < TURN; turned++) {
#pragma unroll 2
            for (int owner = 0; owner < LANES; owner++) {
                int column = leaf * LEAF + turned * LANES + owner;
                float change[HEIGHT], per_diagonal = inverse[column];
#pragma unroll
                for (int i = 0; i < HEIGHT; i++) {
                    float code = fminf(fmaxf(nearest(w[i][0] * per_scale[i]) + grid[i].zero, 0.0f), maximum);
                    float error = (w[i][0] - (code - grid[i].zero) * grid[i].scale) * per_diagonal;
                    if (row.lane == owner) own_error[i][0] = error, own_code[i][0] = code;
                    change[i] = -__shfl_sync(ALL, error, owner, LANES);
                }
                spread(w, change, column, leaf, turned, row.lane, LEAVES - leaf);
            }
            turn(w);
            turn(own_error);
            turn(own_code);
        }
#pragma unroll
        for (int j = 0; j < TURN; j++) {
            int column = leaf * LEAF + LANES * j + row.lane;
            if (column >= columns) continue;
            Four<unsigned short> errors;
            Four<unsigned char> codes;
#pragma unroll
            for (int i = 0; i < HEIGHT; i++) {
                errors.of[i] = to_half(own_error[i][j] * by);
                codes.of[i] = (unsigned char)own_code[i][j];
            }
            store(error_IR + column * stride + row.start, errors, row);
            store(code_IR + column * stride + row.start, codes, row);
        }
        rotate(w);
    }
}

#endif
