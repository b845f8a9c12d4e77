// y[m, n] = sum over blocks b of 128 along k: x_scale[b, m] * w_scale[n / 128, b] * sum over k in b: x[m, k] * w[n, k]
//
// Inputs   x e4m3 [slabs, m, k], k contiguous; x_scale float32 [slabs, k / 128, m_pad], m contiguous; w e4m3
//          [groups, n, k], k contiguous; w_scale float32 [groups, n / 128, k / 128]. Output y bf16 [slabs, m, n].
//          DENSE: one slab, one group. ENDS: one slab, group g owns rows bounds[g - 1] to bounds[g], the rows past
//          the last group become zero. MASKED: slab g meets group g in its first bounds[g] rows, others stay untouched.
// Tiles    A persistent CTA computes BM x BN tiles (schedule.cuh). A cluster of two computes two neighbouring tiles:
//          each CTA loads half of what they share and multicasts it to both.
// Roles    Warp 0 of warpgroup 0 loads: per step of 128 along k a slot of the ring gets x, w and x's scales (by bulk
//          copies) and the tile's w scales, and in a tile's first step what tile it is. Warpgroups 1 and 2 multiply:
//          WARPGROUPS_N side by side along n, the others stacked along m, each one or two waves of 64 rows by WG_COLS
//          columns.
// Sums     The tensor cores' own sum of e4m3 products keeps about 14 bits, so a block's 128 products go to a partial
//          sum that starts from zero, and float32 instructions add it, times both scales, to the tile's. A second wave
//          uses the first one's partial registers; the other warpgroup's products run meanwhile.
// Ring     full[slot] completes when the producer has arrived and all bytes are there; empty[slot] when each
//          multiplying warp of each CTA of the cluster is done with it (a peer's multicast writes here too).
//          tests/kernels/test_gemm_cuda_pipeline.py goes through every order of these events.
// Stores   Each warp rounds its 16 rows of a wave into its own part of shared memory and stores them by TMA while the
//          next tile is computed. Rows of a tile that the group doesn't own are left out: groups need no padding.
// Limits   n a multiple of 8, row strides multiples of 16 bytes, k any: TMA pads its last block with zeros.
#include "schedule.cuh"
#include "sm90.cuh"
#include "wgmma.cuh"

using namespace sm90;

template <int BM_, int BN_, int WARPGROUPS_N_, int STAGES_, Share SHARE_, Layout LAYOUT_>
struct Shape {
    static constexpr int BM = BM_, BN = BN_, BK = 128, STAGES = STAGES_;
    static constexpr Share SHARE = SHARE_;
    static constexpr Layout LAYOUT = LAYOUT_;
    static constexpr int CLUSTER = SHARE == Share::NONE ? 1 : 2;
    static constexpr int WARPGROUPS_N = WARPGROUPS_N_, WARPGROUPS_M = 2 / WARPGROUPS_N;
    static constexpr int WG_ROWS = BM / WARPGROUPS_M, WG_COLS = BN / WARPGROUPS_N, WAVES = WG_ROWS / 64;
    static constexpr int SUMS = WG_COLS / 2;  // registers a thread for 64 rows of WG_COLS float32 values
    static constexpr int THREADS = 384, PRODUCER_REGISTERS = 56, MATH_REGISTERS = 224;

    // Where a tile's first column lies in w's blocks of 128: multiples of this.
    static constexpr int ALIGNED = BN % 128 == 0 ? 128 : BN % 64 == 0 ? 64 : BN % 32 == 0 ? 32 : 16;
    static constexpr int W_BLOCKS = (128 - ALIGNED + BN + 127) / 128;  // the most that a tile can touch

    static constexpr int X_BYTES = BM * BK, W_BYTES = BN * BK;
    static constexpr int X_SCALES = BM + 4, X_SCALE_BYTES = X_SCALES * 4;  // they begin at a multiple of 16 bytes
    static constexpr int BOXES = (WG_COLS + 63) / 64, BOX_BYTES = 16 * 128;  // of the store: 16 rows, 64 columns
    static constexpr int WAVE_BYTES = BOXES * BOX_BYTES, STAGING_BYTES = 8 * WAVES * WAVE_BYTES;
    static constexpr int NOTE_BYTES = 32;  // of a step: four w scales, the tile
    static constexpr int X = 0, W = X + STAGES * X_BYTES, STAGING = W + STAGES * W_BYTES;
    static constexpr int X_SCALE = STAGING + STAGING_BYTES, NOTE = X_SCALE + STAGES * X_SCALE_BYTES;
    static constexpr int FULL = NOTE + STAGES * NOTE_BYTES, EMPTY = FULL + STAGES * 8, BYTES = EMPTY + STAGES * 8;

    static_assert(WG_ROWS % 64 == 0 && WAVES >= 1 && WAVES <= 2, "a warpgroup has one or two waves of 64 rows");
    static_assert(WG_COLS % 16 == 0 && WG_COLS <= 256, "columns are stored in pairs of 8");
    static_assert(WARPGROUPS_N == 1 || WG_COLS % 128 == 0, "warpgroups side by side begin at a block of w");
    static_assert(W_BLOCKS <= 4, "a step carries four w scales");
    static_assert((WAVES + 1) * SUMS <= 192, "sums and partial sums must fit the registers");
    static_assert(BYTES == TILE_BYTES, "the host counts shared memory otherwise");
    static_assert(BYTES <= 232448, "more shared memory than a CTA may have");
};

template <class S>
struct Ring {
    u32 base;
    int slot = 0;
    u32 phase = 0;

    __device__ explicit Ring(u32 base) : base(base) {}
    __device__ u32 full() const { return base + S::FULL + slot * 8; }
    __device__ u32 empty() const { return base + S::EMPTY + slot * 8; }
    __device__ u32 x() const { return base + S::X + slot * S::X_BYTES; }
    __device__ u32 w() const { return base + S::W + slot * S::W_BYTES; }
    __device__ u32 x_scale() const { return base + S::X_SCALE + slot * S::X_SCALE_BYTES; }
    __device__ u32 w_scale() const { return base + S::NOTE + slot * S::NOTE_BYTES; }
    __device__ u32 tile() const { return w_scale() + 16; }

    __device__ void advance() {
        if (++slot == S::STAGES) slot = 0, phase ^= 1;
    }
    // A multiplying warp is done with the slot: lane r tells CTA r of the cluster.
    __device__ void release(u32 lane) const {
        const u32 barrier = S::CLUSTER == 1 ? empty() : peer_address(empty(), lane & (S::CLUSTER - 1));
        barrier_arrive(barrier, lane < S::CLUSTER);
    }
};

// ---------------------------------------------------------------- the producer

// Each lane fetches the scales of one of 32 blocks along k.
template <class S>
__device__ __forceinline__ void fetch_w_scales(float (&scales)[S::W_BLOCKS], const Problem& p, const Tile& tile,
                                               int k_block) {
    const int mine = min(k_block + static_cast<int>(lane_index()), p.k_blocks - 1);
    const int last = (p.n - 1) / 128, group = min(tile.group, p.groups - 1);
#pragma unroll
    for (int i = 0; i < S::W_BLOCKS; ++i) {
        const long long row = min(tile.column / 128 + i, last);
        scales[i] = __ldg(p.w_scale + group * p.w_scale_group + row * p.w_scale_row + mine);
    }
}

template <class S>
__device__ __forceinline__ void load_step(const Ring<S>& ring, const TensorMap& x, const TensorMap& w,
                                          const Problem& p, const Tile& tile, int k_block, int rank) {
    constexpr bool SHARE_X = S::SHARE == Share::X, SHARE_W = S::SHARE == Share::W;
    const int slab = S::LAYOUT == Layout::MASKED ? tile.group : 0;
    const int k = k_block * S::BK;
    const int first_scale = tile.row & ~3, scales = min(p.m_pad - first_scale, S::X_SCALES);
    barrier_arrive_expecting(ring.full(), S::X_BYTES + S::W_BYTES + max(scales, 0) * 4);
    if constexpr (SHARE_X) {
        const int half = rank * (S::BM / 2);
        tma_load_multicast(x, ring.full(), ring.x() + half * S::BK, k, tile.row + half, slab, 3);
    } else {
        tma_load(x, ring.full(), ring.x(), k, tile.row, slab);
    }
    if constexpr (SHARE_W) {
        const int half = rank * (S::BN / 2);
        tma_load_multicast(w, ring.full(), ring.w() + half * S::BK, k, tile.column + half, tile.group, 3);
    } else {
        tma_load(w, ring.full(), ring.w(), k, tile.column, tile.group);
    }
    const float* source = p.x_scale + slab * p.x_scale_slab + k_block * p.x_scale_block + first_scale;
    if (scales > 0) bulk_load(source, ring.full(), ring.x_scale(), scales * 4);
}

template <class S>
__device__ void produce(Ring<S> ring, const TensorMap& x, const TensorMap& w, const Problem& p, int rank) {
    const u32 lane = lane_index();
    Scheduler<S> scheduler(p, blockIdx.x / S::CLUSTER, gridDim.x / S::CLUSTER, rank);
    Tile tile, following;
    float scales[S::W_BLOCKS], next_scales[S::W_BLOCKS];
    bool more = scheduler.next(tile), more_follow = false;
    if (more) fetch_w_scales<S>(next_scales, p, tile, 0);
    while (more) {
        const int steps = tile.kind == ZERO ? 1 : p.k_blocks;
        for (int k_block = 0; k_block < steps; ++k_block) {
            if (k_block % 32 == 0) {
#pragma unroll
                for (int i = 0; i < S::W_BLOCKS; ++i) scales[i] = next_scales[i];
            }
            barrier_wait(ring.empty(), ring.phase ^ 1);
#pragma unroll
            for (int i = 0; i < S::W_BLOCKS; ++i) {
                const float scale = __shfl_sync(~0u, scales[i], k_block % 32);
                if (lane == 0) store_shared(ring.w_scale() + 4 * i, scale);
            }
            if (lane == 0) {
                if (k_block == 0) {
                    const int slab = S::LAYOUT == Layout::MASKED ? tile.group : 0;
                    store_shared(ring.tile(), make_int4(tile.row, tile.row_end, tile.column, slab << 2 | tile.kind));
                }
                if (tile.kind == ZERO) {
                    barrier_arrive(ring.full(), true);
                } else {
                    load_step(ring, x, w, p, tile, k_block, rank);
                }
            }
            __syncwarp();
            ring.advance();
            if (k_block % 32 == 0) {  // what the next 32 steps or the next tile need, while this step's bytes travel
                if (k_block + 32 < steps) {
                    fetch_w_scales<S>(next_scales, p, tile, k_block + 32);
                } else {
                    more_follow = scheduler.next(following);
                    if (more_follow) fetch_w_scales<S>(next_scales, p, following, 0);
                }
            }
        }
        tile = following, more = more_follow;
    }
    barrier_wait(ring.empty(), ring.phase ^ 1);
    if (lane == 0) {
        store_shared(ring.tile(), make_int4(0, 0, 0, END));
        barrier_arrive(ring.full(), true);
    }
    __syncwarp();
    let_later_kernels_start();
}

// ---------------------------------------------------------------- the multiplying warpgroups

struct Place {
    int wg_m, wg_n;  // of the warpgroup in the tile
    int scale_row;   // of this thread's first row among the tile's x scales
};

// All steps of a tile, for the first WAVES waves of this warpgroup. OFFSET: the tile's first column in its block of w.
template <class S, int OFFSET, int WAVES>
__device__ __forceinline__ void multiply(float (&sums)[S::WAVES][S::SUMS], Ring<S>& ring, int k_blocks,
                                         const Place& place) {
    constexpr int W_BLOCKS = (OFFSET + S::WG_COLS + 127) / 128;
    const u32 lane = lane_index();
#pragma unroll
    for (int wave = 0; wave < S::WAVES; ++wave)
#pragma unroll
        for (int i = 0; i < S::SUMS; ++i) sums[wave][i] = 0.f;

    float partial[S::SUMS];
#pragma unroll
    for (int i = 0; i < S::SUMS; ++i) partial[i] = 0.f;
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        barrier_wait(ring.full(), ring.phase);
        if constexpr (WAVES == 0) ring.release(lane);
        float w_scale[W_BLOCKS];
#pragma unroll
        for (int i = 0; i < W_BLOCKS; ++i)
            w_scale[i] = load_shared(ring.w_scale() + 4 * (i + place.wg_n * (S::WG_COLS / 128)));
        const u64 w = matrix_descriptor(ring.w() + place.wg_n * S::WG_COLS * S::BK);
#pragma unroll
        for (int wave = 0; wave < WAVES; ++wave) {
            const u32 scale = ring.x_scale() + 4 * (place.scale_row + 64 * wave);
            const float upper = load_shared(scale), lower = load_shared(scale + 32);
            const u64 x = matrix_descriptor(ring.x() + (place.wg_m * S::WG_ROWS + 64 * wave) * S::BK);
            wgmma_fence();
            wgmma_zero(partial, x, w);
#pragma unroll
            for (int i = 1; i < S::BK / 32; ++i) wgmma_add(partial, x + 2 * i, w + 2 * i);
            wgmma_commit();
            wgmma_wait(partial);
            if (wave == WAVES - 1) ring.release(lane);
#pragma unroll
            for (int i = 0; i < S::SUMS / 4; ++i) {
                const float factor = w_scale[(OFFSET + 8 * i) / 128], above = upper * factor, below = lower * factor;
                sums[wave][4 * i] += above * partial[4 * i];
                sums[wave][4 * i + 1] += above * partial[4 * i + 1];
                sums[wave][4 * i + 2] += below * partial[4 * i + 2];
                sums[wave][4 * i + 3] += below * partial[4 * i + 3];
            }
        }
        ring.advance();
    }
}

template <class S, int OFFSET>
__device__ __forceinline__ void multiply_valid(float (&sums)[S::WAVES][S::SUMS], Ring<S>& ring, int k_blocks,
                                               const Place& place, int waves) {
    if (S::LAYOUT == Layout::DENSE || waves == S::WAVES) {
        multiply<S, OFFSET, S::WAVES>(sums, ring, k_blocks, place);
    } else if (S::WAVES == 2 && waves == 1) {
        multiply<S, OFFSET, 1>(sums, ring, k_blocks, place);
    } else {
        multiply<S, OFFSET, 0>(sums, ring, k_blocks, place);
    }
}

// One instance of the loop for each place that a tile's first column can have in its block of w.
template <class S, int OFFSET = 0>
__device__ __forceinline__ void multiply_tile(float (&sums)[S::WAVES][S::SUMS], Ring<S>& ring, int k_blocks,
                                              const Place& place, int waves, int offset) {
    if constexpr (OFFSET + S::ALIGNED < 128) {
        if (offset != OFFSET) {
            multiply_tile<S, OFFSET + S::ALIGNED>(sums, ring, k_blocks, place, waves, offset);
            return;
        }
    }
    multiply_valid<S, OFFSET>(sums, ring, k_blocks, place, waves);
}

// Copies a box's first `rows` rows from shared memory, 16 bytes a lane and time; n is a multiple of 8.
template <class S>
__device__ __forceinline__ void store_rows(const Problem& p, u32 source, int slab, int row, int column, int rows,
                                           int columns) {
    unsigned short* y = p.y + slab * p.y_slab + row * p.y_row + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int piece = lane_index() + 32 * i, r = piece / 8, c = piece % 8;
        if (r < rows && 8 * c < columns && column + 8 * c < p.n) {
            const int4 values = load_shared_int4(source + r * 128 + ((c ^ (r & 7)) << 4));
            *reinterpret_cast<int4*>(y + r * p.y_row + 8 * c) = values;
        }
    }
}

template <class S>
__device__ __forceinline__ void store_tile(const float (&sums)[S::WAVES][S::SUMS], u32 staging, const TensorMap& y,
                                           const Problem& p, int slab, int row, int row_end, int column) {
    const u32 lane = lane_index();
    if (lane == 0) tma_store_wait_read();
    __syncwarp();
#pragma unroll
    for (int wave = 0; wave < S::WAVES; ++wave) {
        if (row + 64 * wave >= row_end) continue;
#pragma unroll
        for (int i = 0; i < S::WG_COLS / 16; ++i) {
            const u32 box = staging + wave * S::WAVE_BYTES + (i / 4) * S::BOX_BYTES;
            const u32 piece = 2 * (i % 4) + lane / 16;
            const float* v = sums[wave] + 8 * i;
            store_matrices(box + (lane % 16) * 128 + ((piece ^ (lane & 7)) << 4), pack_bf16(v[0], v[1]),
                           pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        }
    }
    fence_async();
    __syncwarp();
#pragma unroll
    for (int wave = 0; wave < S::WAVES; ++wave) {
        const int first = row + 64 * wave, rows = min(row_end - first, 16);
        if (rows <= 0) continue;
#pragma unroll
        for (int box = 0; box < S::BOXES; ++box) {
            constexpr int WHOLE = S::WG_COLS / 64;
            const u32 source = staging + wave * S::WAVE_BYTES + box * S::BOX_BYTES;
            const int left = column + 64 * box;
            if (left >= p.n) continue;
            if (box < WHOLE && rows == 16) {
                if (lane == 0) tma_store(y, source, left, first, slab);
            } else {
                store_rows<S>(p, source, slab, first, left, rows, box < WHOLE ? 64 : S::WG_COLS % 64);
            }
        }
    }
    if (lane == 0) tma_store_commit();
    __syncwarp();
}

template <class S>
__device__ void consume(Ring<S> ring, const TensorMap& y, const Problem& p) {
    const int math_warp = threadIdx.x / 32 - 4, warpgroup = math_warp / 4;
    const int wg_m = warpgroup / S::WARPGROUPS_N, wg_n = warpgroup % S::WARPGROUPS_N;
    const u32 staging = ring.base + S::STAGING + math_warp * S::WAVES * S::WAVE_BYTES;
    float sums[S::WAVES][S::SUMS];
    while (true) {
        barrier_wait(ring.full(), ring.phase);
        const int4 note = load_shared_int4(ring.tile());
        const int kind = note.w & 3, slab = note.w >> 2, row_end = note.y;
        if (kind == END) break;
        const int row = note.x + wg_m * S::WG_ROWS, column = note.z + wg_n * S::WG_COLS;
        int waves = min(max(row_end - row + 63, 0) / 64, S::WAVES);
        if (column >= p.n || kind == ZERO) waves = 0;
        const int steps = kind == ZERO ? 1 : p.k_blocks;
        const int warp_row = math_warp % 4 * 16;  // in its wave
        const int scale_row = (note.x & 3) + wg_m * S::WG_ROWS + warp_row + lane_index() / 4;
        multiply_tile<S>(sums, ring, steps, {wg_m, wg_n, scale_row}, waves, note.z % 128);
        if (column < p.n) store_tile<S>(sums, staging, y, p, slab, row + warp_row, row_end, column);
    }
    if (lane_index() == 0) tma_store_wait();
    __syncwarp();
}

using Chosen = Shape<TILE_M, TILE_N, TILE_WARPGROUPS_N, TILE_STAGES, Share::TILE_SHARE, Layout::TILE_LAYOUT>;

extern "C" __global__ void __launch_bounds__(Chosen::THREADS, 1)
    fp8_gemm(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
             const __grid_constant__ TensorMap y, const __grid_constant__ Problem p) {
    using S = Chosen;
    extern __shared__ __align__(1024) unsigned char shared[];
    const Ring<S> ring(shared_address(shared));
    const int rank = S::CLUSTER == 1 ? 0 : cluster_rank();
    if (threadIdx.x == 0) {
        prefetch_map(x), prefetch_map(w), prefetch_map(y);
        for (int slot = 0; slot < S::STAGES; ++slot) {
            barrier_init(ring.base + S::FULL + slot * 8, 1);
            barrier_init(ring.base + S::EMPTY + slot * 8, 8 * S::CLUSTER);
        }
        fence_barrier_init();
    }
    if constexpr (S::CLUSTER > 1) {
        __syncwarp();
        cluster_sync();
    } else {
        __syncthreads();
    }
    if (threadIdx.x < 128) {
        keep_registers<S::PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) {
            wait_for_earlier_kernels();
            produce<S>(ring, x, w, p, rank);
        }
    } else {
        take_registers<S::MATH_REGISTERS>();
        consume<S>(ring, y, p);
    }
    // A CTA may not leave while the other can still write to its memory or arrive at its barriers.
    if constexpr (S::CLUSTER > 1) cluster_sync();
}
