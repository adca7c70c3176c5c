// A block of 128 columns of GPTQ, or of descent, in one kernel. NVRTC compiles it, `gptq_cuda.py` launches it.
//
// A thread block works on 32 rows at a time. Each of its four warps holds a leaf of 32 columns of them, in registers, in
// the order in which the tensor core adds products up. Leaves take turns, and so do the two tiles of 16 columns of a
// leaf: the warp that holds a tile lays it out in shared memory, where every thread takes up a row of its own, rounds one
// column after the other, and multiplies what each changes onto the later columns of the tile, in float32. The second
// tile first takes what the first has changed, and when the leaf is done, all warps take it onto what they hold: these
// are products of the tensor core.
//
// Within a tile numbers are in steps of the grid. What a code changes by is then a whole number, which float16 holds;
// what remains of a weight when it is rounded keeps 11 bits, and so does the block's matrix, divided by its diagonal. The
// scale multiplies their products in float32.
//
// Grids are searched by all four warps, each two fractions of the range for all 32 rows, a row to a thread.
//
// A row never depends on another row. Rows beyond the last, and columns beyond `columns`, are zeros that nothing moves.
// Defined when this is compiled: SETTLE or ROUND_BLOCK, SHRINKS, the eight fractions of the range that the grid search
// tries, REFITS, and SHARED_BYTES, the shared memory of a thread block.

constexpr int BLOCK = 128, LEAF = 32, LEAVES = BLOCK / LEAF, TILE = 16, TILES = BLOCK / TILE;
constexpr int ROWS = 32, THREADS = ROWS * LEAVES;
constexpr float TINY = 1e-30f, SMALLEST = 1.17549435e-38f;

// 1.5 · 2²³: added to a number it leaves the nearest whole number, ties to even, and that in the lowest bits. What is too
// far for that is clamped afterwards.
constexpr float WHOLE = 12582912.0f;
constexpr unsigned WHOLE_BITS = 0x4B400000u, ALL = ~0u;

#ifdef SETTLE
constexpr int PARTS = 1;
#else
constexpr int PARTS = 2;
#endif

extern __shared__ float shared[];

#ifdef __CUDACC__
__device__ unsigned short to_half(float x) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
__device__ float from_half(unsigned short half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
__device__ unsigned to_halves(float low, float high) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ unsigned subtract_halves(unsigned a, unsigned b) {
    unsigned both;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}
__device__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ float storable(float x) {
    unsigned bits = __float_as_uint(x);
    return fmaxf(__uint_as_float((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u), SMALLEST);
}

__device__ float clamped(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// A thread: the leaf that its warp holds, its row where it has one of its own, and where the tensor core has it start,
// row `top` and column `left` of every eight.
struct Place {
    int leaf, row, top, left;
    __device__ Place() { leaf = threadIdx.x >> 5, row = threadIdx.x & 31, top = row >> 2, left = (row & 3) * 2; }
};

// A thread's part of 16 columns of 32 rows: of every 8 columns and 16 rows, two columns of row `top` and of row top + 8.
struct Tile {
    float of[2][2][4];
};
struct Held {
    Tile tile[2];
};

// Visit every number that a thread holds, with its row from `top` on and its column from `left` on.
template <typename Visit> __device__ void each(Held& held, Visit visit) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int tile = i / 16, eight = i / 8 % 2, odd = i / 4 % 2, k = i % 4;
        visit(held.tile[tile].of[eight][k / 2][k % 2 * 2 + odd], 8 * k, TILE * tile + 8 * eight + odd);
    }
}

// Of a warp's leaf, how many rows and columns there are. All of them are there mostly, and then nothing need be asked.
struct Extent {
    int rows, columns;
    __device__ bool whole() const { return rows >= ROWS && columns >= LEAF; }
    template <typename Visit> __device__ void each(Held& held, const Place& at, Visit visit) const {
        if (whole()) return ::each(held, visit);
        ::each(held, [&](float& x, int row, int column) {
            if (row + at.top < rows && column + at.left < columns) visit(x, row, column);
        });
    }
    __device__ bool has(int row, int column) const { return row < rows && column < columns; }
    template <typename Visit> __device__ void each_of_row(int tile, int row, Visit visit) const {
        bool all = whole();
#pragma unroll
        for (int i = 0; i < TILE && all; i++) visit(i);
#pragma unroll
        for (int i = 0; i < TILE && !all; i++)
            if (has(row, tile * TILE + i)) visit(i);
    }
};

// What belongs to the four rows of which a thread holds a part.
struct Rows {
    float of[2][2];
    __device__ Rows(const float* value, const Place& at) {
#pragma unroll
        for (int i = 0; i < 4; i++) of[i / 2][i % 2] = value[8 * i + at.top];
    }
    __device__ Rows(float of_own_row, const Place& at) {
#pragma unroll
        for (int i = 0; i < 4; i++) of[i / 2][i % 2] = __shfl_sync(ALL, of_own_row, 8 * i + at.top, 32);
    }
};

// onto += x · by
__device__ void add(Tile& onto, const Tile& x, const Rows& by) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int eight = i / 8, sixteen = i / 4 % 2, k = i % 4;
        float& sum = onto.of[eight][sixteen][k];
        sum = fmaf(x.of[eight][sixteen][k], by.of[sixteen][k / 2], sum);
    }
}

// Of a product's left factor, 32 rows of 16 columns in float16. Which columns the tensor core takes together is free, as
// long as both factors agree: columns 4 l to 4 l + 3 are of one thread, l = left / 2.
struct Left {
    unsigned of[2][4];
};

// Of its right factor, 16 rows by 16 columns: four threads have rows of a column, and each the columns `top`, top + 8.
__device__ void add_product(Tile& sum, const Left& left, uint4 right) {
#pragma unroll
    for (int sixteen = 0; sixteen < 2; sixteen++) {
        multiply(sum.of[0][sixteen], left.of[sixteen], right.x, right.y);
        multiply(sum.of[1][sixteen], left.of[sixteen], right.z, right.w);
    }
}

// Changes of a leaf's codes, or what is left of its weights: the nearest halves, and where there are two parts what
// these miss. 16 columns of a row are eight words; fours of them change places with the row, so that neither storing nor
// loading has threads wait for a bank.
struct Changes {
    uint4 of[PARTS][2][ROWS][2];
    __device__ void put(int tile, const float (&change)[TILE], int row) {
        float rest[TILE];
#pragma unroll
        for (int i = 0; i < TILE; i++) rest[i] = change[i];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            unsigned word[TILE / 2];
#pragma unroll
            for (int i = 0; i < TILE; i += 2) {
                word[i / 2] = to_halves(rest[i], rest[i + 1]);
                rest[i] -= from_half(word[i / 2] & 0xFFFF), rest[i + 1] -= from_half(word[i / 2] >> 16);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                of[part][tile][row][i ^ (row >> 2 & 1)] = {word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]};
        }
    }
    __device__ Left left(int part, int tile, const Place& at) const {
        Left found;
        const uint2* first = (const uint2*)&of[part][tile][at.top][at.left >> 2 ^ at.top >> 2] + (at.left >> 1 & 1);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint2 words = first[8 * i * 4];
            found.of[i / 2][i % 2] = words.x, found.of[i / 2][2 + i % 2] = words.y;
        }
        return found;
    }
};

// 32 rows of WIDTH columns laid out: the eight fours of a leaf's columns change places with the row, for the same reason.
template <int WIDTH> struct Layout {
    float4 of[ROWS][WIDTH / 4];
    static __device__ int turn(int row) { return (row & 3) << 1 | (row >> 2 & 1); }
    __device__ float4 four(int row, int column) const {
        return of[row][(column >> 5) * 8 + ((column >> 2 & 7) ^ turn(row))];
    }
    __device__ void put(const Tile& tile, int leaf, int first, const Place& at) {
        int turned = turn(at.top) ^ at.left >> 2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int eight = i / 4, sixteen = i / 2 % 2, k = i % 2 * 2, place = leaf * 8 + ((first + 8 * eight) / 4 ^ turned);
            float2* half = (float2*)&of[8 * (i % 4) + at.top][place];
            half[at.left >> 1 & 1] = {tile.of[eight][sixteen][k], tile.of[eight][sixteen][k + 1]};
        }
    }
    __device__ void take(float (&x)[TILE], int leaf, int first, int row) const {
        int turned = turn(row);
#pragma unroll
        for (int i = 0; i < TILE; i += 4) {
            float4 found = of[row][leaf * 8 + (first / 4 + i / 4 ^ turned)];
            x[i] = found.x, x[i + 1] = found.y, x[i + 2] = found.z, x[i + 3] = found.w;
        }
    }
    __device__ void put_back(const float (&x)[TILE], int leaf, int first, int row) {
        int turned = turn(row);
#pragma unroll
        for (int i = 0; i < TILE; i += 4)
            of[row][leaf * 8 + (first / 4 + i / 4 ^ turned)] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
    }
};

#ifdef SETTLE
constexpr int RIGHTS = TILES * TILES;
__device__ int right_of(int tile, int onto) { return tile * TILES + onto; }
__device__ bool needed(int, int) { return true; }
#else
constexpr int RIGHTS = TILES * (TILES - 1) / 2;
__device__ int right_of(int tile, int onto) { return tile * (TILES - 1) - tile * (tile - 1) / 2 + onto - tile - 1; }
__device__ bool needed(int tile, int onto) { return onto > tile; }
#endif

// The block's matrix over its diagonal, zero onto columns that it does not have, and anything from these: from tile to
// tile, those that the kernel needs, in float16, in the order in which threads take it up, and within tiles in float32.
struct Matrix {
    uint4 right[PARTS][RIGHTS][32];
    float4 within[TILES][TILE][TILE / 4];
    float diagonal[BLOCK], inverse[BLOCK];

    __device__ void share(const float* matrix, long down, long right_by, int columns) {
        int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, last = columns - 1;
        diagonal[threadIdx.x] = matrix[min((int)threadIdx.x, last) * (down + right_by)];
        inverse[threadIdx.x] = threadIdx.x < columns ? 1.0f / diagonal[threadIdx.x] : 0;
        __syncthreads();
        auto over_diagonal = [&](float value, int from, int onto) {
#ifdef SETTLE
            return value * inverse[onto];
#else
            return onto < columns ? value * inverse[from] : 0;
#endif
        };
#pragma unroll 1
        for (int other = warp; other < TILES; other += LEAVES) {
            int onto = other * TILE + (lane >> 2);
            const float* top[2] = {matrix + min(onto, last) * right_by, matrix + min(onto + 8, last) * right_by};
#pragma unroll 4
            for (int tile = 0; tile < TILES; tile++) {
                int from = tile * TILE + (lane & 3) * 4;
                float value[2][4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    long below = min(from + i, last) * down;
#pragma unroll
                    for (int eight = 0; eight < 2; eight++)
                        value[eight][i] = over_diagonal(top[eight][below], from + i, onto + 8 * eight);
                }
                if (!needed(tile, other)) continue;
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    unsigned word[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float &one = value[i / 2][i % 2 * 2], &next = value[i / 2][i % 2 * 2 + 1];
                        word[i] = to_halves(one, next);
                        one -= from_half(word[i] & 0xFFFF), next -= from_half(word[i] >> 16);
                    }
                    right[part][right_of(tile, other)][lane] = {word[0], word[1], word[2], word[3]};
                }
            }
        }
#pragma unroll 8
        for (int i = threadIdx.x; i < BLOCK * TILE; i += THREADS) {
            int from = i / TILE, onto = from / TILE * TILE + i % TILE;
            ((float*)within)[i] = over_diagonal(matrix[min(from, last) * down + min(onto, last) * right_by], from, onto);
        }
    }
};
static_assert(THREADS == BLOCK && TILES == 2 * LEAVES, "a thread has a diagonal entry, a warp two tiles to come from");

// Visit the columns of a tile in turn; what a visit returns is multiplied onto the later ones.
template <typename Visit>
__device__ void in_turn(float (&x)[TILE], float (&change)[TILE], const float4 (&within)[TILE][TILE / 4], Visit visit) {
#pragma unroll
    for (int column = 0; column < TILE; column++) {
        float by = change[column] = visit(column, x[column]);
#pragma unroll
        for (int i = (column + 1) / 4; i < TILE / 4; i++) {
            float4 m = within[column][i];
            if (4 * i > column) x[4 * i] = fmaf(m.x, by, x[4 * i]);
            if (4 * i + 1 > column) x[4 * i + 1] = fmaf(m.y, by, x[4 * i + 1]);
            if (4 * i + 2 > column) x[4 * i + 2] = fmaf(m.z, by, x[4 * i + 2]);
            x[4 * i + 3] = fmaf(m.w, by, x[4 * i + 3]);
        }
    }
}

// What tile `tile` of a leaf has changed, times the matrix onto another tile; of what two second parts would add, nothing.
__device__ void add_changes(
    Tile& sum, const Changes& changes, const Matrix& matrix, int leaf, int tile, int onto, const Place& at
) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        Left left = changes.left(part, tile, at);
#pragma unroll
        for (int other = 0; other < PARTS - part; other++)
            add_product(sum, left, matrix.right[other][right_of(2 * leaf + tile, onto)][at.row]);
    }
}

// What a leaf has changed, in steps of `scale`, onto what a warp holds.
__device__ void spread(
    Held& held, const Changes& changes, const Matrix& matrix, int leaf, const float* scale, const Place& at
) {
    Held sum = {};
#pragma unroll 1
    for (int tile = 0; tile < 2; tile++)
#pragma unroll
        for (int onto = 0; onto < 2; onto++)
            add_changes(sum.tile[onto], changes, matrix, leaf, tile, 2 * at.leaf + onto, at);
    Rows by(scale, at);
#pragma unroll
    for (int onto = 0; onto < 2; onto++) add(held.tile[onto], sum.tile[onto], by);
}

// Round a tile of the leaf that this warp holds, `visit` as for `in_turn`, for the thread's row. What the first tile has
// changed is taken onto the second before that is laid out; what is held stays as it is.
template <int WIDTH, typename Visit>
__device__ void round_tile(
    int tile, const Held& held, Layout<WIDTH>& layout, Changes& changes, const Matrix& matrix, const float* scale,
    const Place& at, Visit visit
) {
    int leaf = WIDTH == BLOCK ? at.leaf : 0;
    Tile now = held.tile[0];
    if (tile) {
        Tile sum = {};
        add_changes(sum, changes, matrix, at.leaf, 0, 2 * at.leaf + 1, at);
        now = held.tile[1];
        add(now, sum, Rows(scale, at));
    }
    layout.put(now, leaf, tile * TILE, at);
    __syncwarp();
    float x[TILE], change[TILE], per_scale = 1.0f / scale[at.row];
    layout.take(x, leaf, tile * TILE, at.row);
#pragma unroll
    for (int i = 0; i < TILE; i++) x[i] *= per_scale;
    in_turn(x, change, matrix.within[2 * at.leaf + tile], visit);
    changes.put(tile, change, at.row);
    layout.put_back(x, leaf, tile * TILE, at.row);
    __syncwarp();
}

// Where the block starts in a kernel's tensors, and which rows of it are at hand.
#define GO_TO_BLOCK(values_IR, changes_IR, matrix_II)                                                 \
    long before_it = (long)start * stride;                                                            \
    values_IR += before_it, changes_IR += before_it, code_IR += before_it;                            \
    matrix_II += (long)start * (down + right), scale_SR += start / LEAF * stride, zero_SR += start / LEAF * stride;

#ifdef SETTLE

__device__ float with_whole(unsigned packed, int byte) {
    return __uint_as_float(__byte_perm(packed, WHOLE_BITS, 0x7650 + byte));
}

// The lowest bytes of four numbers.
__device__ unsigned packed(const float* x) {
    unsigned low = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x40);
    return __byte_perm(low, __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x40), 0x5410);
}

__device__ unsigned joined(const unsigned* bytes) {
    return __byte_perm(__byte_perm(bytes[0], bytes[1], 0x40), __byte_perm(bytes[2], bytes[3], 0x40), 0x5410);
}

// Codes of 32 rows, a leaf's in two fours of words; a further one keeps threads from waiting for a bank.
struct Codes {
    uint4 of[ROWS][BLOCK / 16 + 1];
    __device__ unsigned char* at(int row, int column) { return (unsigned char*)of[row] + column; }
    // Levels, code − zero, of 16 columns from `column` on: 1024 + code is 1024 and code in the bits of float16, and `base`
    // has 1024 + zero of the thread's rows twice.
    __device__ Left levels(int column, const unsigned (&base)[4], const Place& place) {
        Left found;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned four = *(const unsigned*)at(8 * i + place.top, column + 2 * place.left);
            found.of[i / 2][i % 2] = subtract_halves(__byte_perm(four, 0x64646464u, 0x4140), base[i]);
            found.of[i / 2][2 + i % 2] = subtract_halves(__byte_perm(four, 0x64646464u, 0x4342), base[i]);
        }
        return found;
    }
};

struct Shared {
    Matrix matrix;
    Changes changes[2];
    Layout<LEAF> layout;
    Codes codes;
    float scale[LEAVES][ROWS], zero[LEAVES][ROWS], slope[LEAVES][ROWS], curve[LEAVES][ROWS];
    int stride;
};

__device__ void move_codes(Held& held, Shared& in, float maximum, int leaves, const Place& at) {
    for (int leaf = 0; leaf < leaves; leaf++) {
        Changes& changes = in.changes[leaf % 2];
        if (leaf == at.leaf) {
#pragma unroll 1
            for (int tile = 0; tile < 2; tile++) {
                uint4& own = in.codes.of[at.row][2 * leaf + tile];
                unsigned code[4] = {own.x, own.y, own.z, own.w};
                float moved[4];
                round_tile(tile, held, in.layout, changes, in.matrix, in.scale[leaf], at, [&](int column, float pull) {
                    float before = with_whole(code[column / 4], column % 4);
                    float now = moved[column % 4] = clamped(before + pull, WHOLE, WHOLE + maximum);
                    if (column % 4 == 3) code[column / 4] = packed(moved);
                    return before - now;
                });
                own = {code[0], code[1], code[2], code[3]};
            }
        }
        __syncthreads();
        spread(held, changes, in.matrix, leaf, in.scale[leaf], at);
    }
}

// Of the leaf that a warp holds, what its columns add to g·l and to lᵀHl of every row, if the levels l are its own.
__device__ void measure(Shared& in, Held& held, Held& onto, int group, const Place& at) {
    Rows zero(in.zero[group], at);
    float slope[2][2] = {}, curve[2][2] = {};
#pragma unroll
    for (int i = 0; i < 16; i++) {
        int tile = i / 8, eight = i / 4 % 2, sixteen = i / 2 % 2, half = i % 2;
        int column = at.leaf * LEAF + TILE * tile + 8 * eight + at.left;
        unsigned codes = *(const unsigned short*)in.codes.at(16 * sixteen + 8 * half + at.top, column);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float level = __uint_as_float(WHOLE_BITS | (codes >> 8 * k & 255)) - (WHOLE + zero.of[sixteen][half]);
            float weighted = level * in.matrix.diagonal[column + k];
            float& own_slope = slope[sixteen][half];
            float& own_curve = curve[sixteen][half];
            own_slope = fmaf(held.tile[tile].of[eight][sixteen][2 * half + k], weighted, own_slope);
            own_curve = fmaf(onto.tile[tile].of[eight][sixteen][2 * half + k], weighted, own_curve);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float g = slope[i / 2][i % 2], h = curve[i / 2][i % 2];
        g += __shfl_xor_sync(ALL, g, 1), h += __shfl_xor_sync(ALL, h, 1);
        g += __shfl_xor_sync(ALL, g, 2), h += __shfl_xor_sync(ALL, h, 2);
        if (at.left == 0) in.slope[at.leaf][8 * i + at.top] = g, in.curve[at.leaf][8 * i + at.top] = h;
    }
}

__device__ void move_scales(Held& held, Shared& in, int leaves_of_group, int leaves, const Place& at) {
    for (int group = 0; group < leaves; group += leaves_of_group) {
        int end = min(group + leaves_of_group, leaves);
        Held onto = {};
        unsigned base[4];
#pragma unroll
        for (int i = 0; i < 4; i++) base[i] = 0x64006400u + (unsigned)in.zero[group][8 * i + at.top] * 0x10001u;
#pragma unroll 1
        for (int tile = 2 * group; tile < 2 * end; tile++) {
            Left left = in.codes.levels(tile * TILE, base, at);
#pragma unroll
            for (int i = 0; i < 2; i++)
                add_product(onto.tile[i], left, in.matrix.right[0][right_of(tile, 2 * at.leaf + i)][at.row]);
        }
        bool own = group <= at.leaf && at.leaf < end;
        if (own) measure(in, held, onto, group, at);
        float now = in.scale[group][at.row], slope = 0, curve = 0;
        __syncthreads();
        for (int leaf = group; leaf < end; leaf++) slope += in.slope[leaf][at.row], curve += in.curve[leaf][at.row];
        float wanted = now + slope / fmaxf(curve, TINY);
        float step = storable(fmaxf(wanted, TINY)) - now;
        if (!(step * (2 * slope - step * curve) > 0 && wanted > TINY)) step = 0;
        if (own) in.scale[at.leaf][at.row] = now + step;
        Rows by(-step, at);
#pragma unroll
        for (int i = 0; i < 2; i++) add(held.tile[i], onto.tile[i], by);
    }
    __syncthreads();
}

// Codes, scales and codes again; change, in float16, is 2^exponent times what was added to Q.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) settle(
    float* pull_IR, unsigned short* change_IR, unsigned char* code_IR, float* scale_SR, const float* zero_SR,
    const float* damped_II, const float* maximum_P, const int* leaves_P, int exponent, int rows, int stride, int down,
    int right, int start, int columns
) {
    static_assert(sizeof(Shared) <= SHARED_BYTES, "more shared memory than is asked for");
    Shared& in = *(Shared*)shared;
    GO_TO_BLOCK(pull_IR, change_IR, damped_II)
    in.matrix.share(damped_II, down, right, columns);
    Place at;
    int leaves = (columns + LEAF - 1) / LEAF, leaves_of_group = leaves_P[blockIdx.y];
    float maximum = maximum_P[blockIdx.y], by = ldexpf(1.0f, exponent);
    for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        int base = blockIdx.y * rows + first, own = at.leaf * LEAF * stride + base;
        Extent extent = {rows - first, columns - at.leaf * LEAF};
        float* pulls = pull_IR + own + at.left * stride + at.top;
        const float *diagonal = in.matrix.diagonal + at.leaf * LEAF + at.left, *inverse = diagonal + BLOCK;
        Held held = {};
        extent.each(held, at, [&](float& pull, int row, int column) { pull = (pulls + column * stride)[row]; });
        each(held, [&](float& pull, int, int column) { pull *= inverse[column]; });
        int first_leaf = at.leaf / leaves_of_group * leaves_of_group, slot = first_leaf * stride + base + at.row;
        bool there = first_leaf < leaves && at.row < extent.rows;
        float scale = there ? scale_SR[slot] : 1, zero = there ? zero_SR[slot] : 0;
        in.scale[at.leaf][at.row] = scale, in.zero[at.leaf][at.row] = zero, in.stride = stride;
        unsigned char* codes = code_IR + own + at.row;
        uint4 before[2];
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            unsigned code[TILE];
#pragma unroll
            for (int i = 0; i < TILE; i++) {
                int column = tile * TILE + i;
                code[i] = extent.has(at.row, column) ? codes[column * stride] : (unsigned)zero;
            }
            before[tile] = {joined(code), joined(code + 4), joined(code + 8), joined(code + 12)};
            in.codes.of[at.row][2 * at.leaf + tile] = before[tile];
        }
        __syncthreads();
        for (int again = 0; again < 2; again++) {
            move_codes(held, in, maximum, leaves, at);
            if (!again) move_scales(held, in, leaves_of_group, leaves, at);
        }
        int apart = in.stride;  // the same, but no address need be kept in a register from the beginning
        extent.each(held, at, [&](float& pull, int row, int column) {
            (pulls + column * apart)[row] = pull * diagonal[column];
        });
        float moved = in.scale[at.leaf][at.row];
        if (at.row < extent.rows && extent.columns > 0) scale_SR[at.leaf * stride + base + at.row] = moved;
        unsigned short* changes = change_IR + own + at.row;
#pragma unroll 1
        for (int tile = 0; tile < 2; tile++) {
            uint4 was = tile ? before[1] : before[0], is = in.codes.of[at.row][2 * at.leaf + tile];
            unsigned old[4] = {was.x, was.y, was.z, was.w}, code[4] = {is.x, is.y, is.z, is.w};
            auto store = [&](int i) {
                float level = with_whole(code[i / 4], i % 4) - (WHOLE + zero);
                float change = level * moved - (with_whole(old[i / 4], i % 4) - (WHOLE + zero)) * scale;
                int place = (tile * TILE + i) * apart;
                changes[place] = to_half(change * by), codes[place] = (unsigned char)(code[i / 4] >> 8 * (i % 4));
            };
            extent.each_of_row(tile, at.row, store);
        }
        __syncthreads();
    }
}

#endif
#ifdef ROUND_BLOCK

constexpr int SHARE = 2;
__constant__ float shrinks[] = {SHRINKS};
static_assert(sizeof(shrinks) / sizeof(float) == SHARE * LEAVES, "a warp tries two fractions of the range");

struct Grid {
    float scale, zero, loss;
};

struct Shared {
    Matrix matrix;
    Changes changes[2];
    Layout<BLOCK> layout;
    Grid best[LEAVES][ROWS];
    float scale[LEAVES][ROWS], zero[LEAVES][ROWS], norm[LEAVES][ROWS], product[LEAVES][ROWS], missed[LEAVES][ROWS];
};

// Levels of a row's nearest codes on a grid.
struct Levels {
    float low, high, scale, per_scale;
    __device__ Levels(float scale_, float zero, float maximum) {
        low = WHOLE - zero, high = WHOLE + maximum - zero, scale = scale_, per_scale = 1.0f / scale_;
    }
    __device__ float of(float w) const { return clamped(fmaf(w, per_scale, WHOLE), low, high) - WHOLE; }
    __device__ float error(float w, float weight) const { return fmaf(of(w), scale, -w) * weight; }
};

// Visit a thread's weights from one column to another, with the inverse of the factor's diagonal.
template <typename Visit> __device__ void each_weight(Shared& in, int first, int end, int row, Visit visit) {
#pragma unroll 1
    for (int column = first; column < end; column += 4) {
        float4 w = in.layout.four(row, column), inverse = *(const float4*)&in.matrix.inverse[column];
        visit(w.x, inverse.x), visit(w.y, inverse.y), visit(w.z, inverse.z), visit(w.w, inverse.w);
    }
}

// What all warps have found of a thread's row.
__device__ float summed(const float (&part)[LEAVES][ROWS], int row) {
    return (part[0][row] + part[1][row]) + (part[2][row] + part[3][row]);
}

// Of a group from one column to another, the best grid among the fractions that this warp tries.
__device__ Grid tried(Shared& in, float maximum, int first, int end, const Place& at) {
    float low = 0, high = 0, loss[SHARE][2] = {};
    each_weight(in, first, end, at.row, [&](float w, float) { low = fminf(low, w), high = fmaxf(high, w); });
    float span = fmaxf(high - low, TINY), scale[SHARE], per_scale[SHARE], zero[SHARE][2];
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
        float shrink = shrinks[at.leaf * SHARE + i];
        scale[i] = storable(span * shrink / maximum), per_scale[i] = 1.0f / scale[i];
        float below = floorf(-low * shrink / scale[i]);
        zero[i][0] = clamped(below, 0, maximum), zero[i][1] = clamped(below + 1, 0, maximum);
    }
    each_weight(in, first, end, at.row, [&](float w, float weight) {
#pragma unroll
        for (int i = 0; i < SHARE; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float nearest = fmaf(w, per_scale[i], WHOLE);
                float level = clamped(nearest, WHOLE - zero[i][k], WHOLE + maximum - zero[i][k]) - WHOLE;
                float error = fmaf(level, scale[i], -w) * weight;
                loss[i][k] = fmaf(error, error, loss[i][k]);
            }
    });
    Grid best = {scale[0], zero[0][0], loss[0][0]};
#pragma unroll
    for (int i = 1; i < 2 * SHARE; i++)
        if (loss[i / 2][i % 2] < best.loss) best = {scale[i / 2], zero[i / 2][i % 2], loss[i / 2][i % 2]};
    return best;
}

// `grid.search_grid` of a group from one column to another, which is laid out, for the thread's row.
__device__ Grid searched(Shared& in, float maximum, int first, int end, const Place& at) {
    in.best[at.leaf][at.row] = tried(in, maximum, first, end, at);
    __syncthreads();
    Grid best = in.best[0][at.row];
#pragma unroll
    for (int i = 1; i < LEAVES; i++)
        if (in.best[i][at.row].loss < best.loss) best = in.best[i][at.row];
    int share = (end - first) / LEAVES, own = first + at.leaf * share;
    for (int refit = 0; refit < REFITS; refit++) {
        Levels levels(best.scale, best.zero, maximum);
        float norm = 0, product = 0, missed = 0;
        each_weight(in, own, own + share, at.row, [&](float w, float weight) {
            float level = levels.of(w), weighted = level * weight * weight;
            norm = fmaf(weighted, level, norm), product = fmaf(weighted, w, product);
        });
        in.norm[at.leaf][at.row] = norm, in.product[at.leaf][at.row] = product;
        __syncthreads();
        norm = summed(in.norm, at.row), product = summed(in.product, at.row);
        float trial = norm > 0 && product > 0 ? storable(product / fmaxf(norm, TINY)) : best.scale;
        Levels now(trial, best.zero, maximum);
        each_weight(in, own, own + share, at.row, [&](float w, float weight) {
            float error = now.error(w, weight);
            missed = fmaf(error, error, missed);
        });
        in.missed[at.leaf][at.row] = missed;
        __syncthreads();
        missed = summed(in.missed, at.row);
        if (missed < best.loss) best.loss = missed, best.scale = trial;
    }
    return best;
}

// Grids searched, columns rounded; error, in float16, is 2^exponent times each column's over the factor's diagonal.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) round_block(
    const float* w_IR, unsigned short* error_IR, unsigned char* code_IR, float* scale_SR, float* zero_SR,
    const float* factor_II, const float* maximum_P, const int* leaves_P, int exponent, int rows, int stride, int down,
    int right, int start, int columns
) {
    static_assert(sizeof(Shared) <= SHARED_BYTES, "more shared memory than is asked for");
    Shared& in = *(Shared*)shared;
    GO_TO_BLOCK(w_IR, error_IR, factor_II)
    in.matrix.share(factor_II, down, right, columns);
    Place at;
    int leaves = (columns + LEAF - 1) / LEAF, leaves_of_group = leaves_P[blockIdx.y];
    float maximum = maximum_P[blockIdx.y], by = ldexpf(1.0f, exponent);
    for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        int base = blockIdx.y * rows + first, own = at.leaf * LEAF * stride + base;
        Extent extent = {rows - first, columns - at.leaf * LEAF};
        const float* weights = w_IR + own + at.left * stride + at.top;
        Held held = {};
        extent.each(held, at, [&](float& w, int row, int column) { w = (weights + column * stride)[row]; });
        for (int leaf = 0; leaf < leaves; leaf++) {
            if (leaf % leaves_of_group == 0) {
                int end = leaf + leaves_of_group;
                bool of_group = leaf <= at.leaf && at.leaf < end;
#pragma unroll
                for (int tile = 0; tile < 2; tile++)
                    if (of_group) in.layout.put(held.tile[tile], at.leaf, tile * TILE, at);
                __syncthreads();
                Grid grid = searched(in, maximum, leaf * LEAF, end * LEAF, at);
                if (of_group) in.scale[at.leaf][at.row] = grid.scale, in.zero[at.leaf][at.row] = grid.zero;
                if (leaf == at.leaf && at.row < extent.rows) {
                    scale_SR[leaf * stride + base + at.row] = grid.scale;
                    zero_SR[leaf * stride + base + at.row] = grid.zero;
                }
                __syncwarp();
            }
            Changes& changes = in.changes[leaf % 2];
            if (leaf != at.leaf) {
                __syncthreads();
                if (leaf < at.leaf) spread(held, changes, in.matrix, leaf, in.scale[leaf], at);
                continue;
            }
            float scale = in.scale[leaf][at.row], zero = in.zero[leaf][at.row];
            float low = WHOLE - zero, high = WHOLE + maximum - zero;
#pragma unroll 1
            for (int tile = 0; tile < 2; tile++)
                round_tile(tile, held, in.layout, changes, in.matrix, in.scale[leaf], at, [&](int, float w) {
                    return (clamped(w + WHOLE, low, high) - WHOLE) - w;
                });
            held = {};
            __syncthreads();
            unsigned short* errors = error_IR + own + at.row;
            unsigned char* codes = code_IR + own + at.row;
#pragma unroll 1
            for (int tile = 0; tile < 2; tile++) {
                float w[TILE];
                in.layout.take(w, leaf, tile * TILE, at.row);
                extent.each_of_row(tile, at.row, [&](int i) {
                    int column = tile * TILE + i;
                    float level = clamped(w[i] + WHOLE, low, high);
                    float error = (w[i] - (level - WHOLE)) * scale * in.matrix.inverse[leaf * LEAF + column];
                    errors[column * stride] = to_half(error * by);
                    codes[column * stride] = (unsigned char)__float_as_uint(level + zero);
                });
            }
        }
        __syncthreads();
    }
}

#endif
