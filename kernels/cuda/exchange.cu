// Tokens to the ranks that hold their experts, and their results back, over pointers into the peers' memory.
//
// plan            place[t, r] = how many tokens before t go to rank r, -1 where t doesn't; counts[r]. One CTA.
// dispatch_start  a warp takes a token: one bulk load into shared memory, quantised there to e4m3 with a scale for 128
//                 columns where asked for (or given so, with scales in the GEMM's layout, which are gathered), one bulk
//                 store a rank that needs it; meta (expert ids, weights, token) by
//                 ordinary stores. The last CTA raises the peers' flags. dispatch_start_planning plans too, every CTA
//                 all of it: for few tokens that is cheaper than another kernel.
// dispatch_wait   waits for all ranks, then unpacks meta, turns scales into the GEMM's layout [D / 128, M_pad], and
//                 copies the rows out of the stage if asked to, which frees it.
// combine_start   a warp takes a row: bulk load, bulk store into the owner's `back`. Rows go in `chunks`: after each,
//                 flags tell how far every owner's rows have come, so that it can begin to sum.
// combine_wait    a warp takes a part of a token: waits until its rows are there, sums them in float32, ranks in order.
// release         frees the stage where no combine does.
//
// y[t] = sum over ranks r with place[t, r] >= 0, ascending: back[r, t]. Results don't depend on timing, bit for bit.
// Every grid may have any number of CTAs. Flags, order and failures: exchange.cuh.
#include "exchange.cuh"

struct Head {  // of the shared memory of a CTA
    u64 barrier[16];
    int counts[8], note, pad[7];
    int by_warp[32 * 8];
};
constexpr int HEAD_BYTES = sizeof(Head), PLACES_BYTES = FEW_TOKENS * W * 4;
constexpr int SENDER_BYTES = (TOKEN_BYTES + (QUANTIZES ? ROW_BYTES : 0) + SCALE_BYTES + 127) / 128 * 128;
constexpr int RETURN_BYTES = (INPUT_BYTES + 127) / 128 * 128;
static_assert(HEAD_BYTES == 1216 && HEAD_BYTES + 64 == HEAD_ROOM, "the host counts shared memory otherwise");
static_assert(SENDER_BYTES == SENDER_ROOM && RETURN_BYTES == RETURN_ROOM, "the host counts shared memory otherwise");

__device__ __forceinline__ Head& head() { return *reinterpret_cast<Head*>(dynamic_shared()); }

// This warp's barrier, ready for use.
__device__ __forceinline__ u32 own_barrier() {
    const u32 barrier = sm90::shared_address(&head().barrier[warp_index()]);
    if (lane_index() == 0) {
        sm90::barrier_init(barrier, 1);
        sm90::fence_barrier_init();
    }
    __syncwarp();
    return barrier;
}

// By all lanes: begins to load a row once all stores of what lay there before have been read.
__device__ __forceinline__ void begin_load(const char* source, u32 barrier, u32 destination, u32 bytes) {
    if (lane_index() == 0) {
        sm90::barrier_arrive_expecting(barrier, bytes);
        sm90::bulk_load(source, barrier, destination, bytes);
    }
}

// Quantisation

// Eight values of a row, e4m3, and for the first of the 16 lanes of a block its scale: max |x| / 448, values x / scale,
// both rounded to nearest. With the reciprocal of the scale, two corrections give the quotient as division rounds it,
// unless the scale is near the ends of float32, not finite, or all ones.
__device__ __forceinline__ uint2 quantize(int4 input, bool held, float& scale) {
    const u32 pairs[4] = {static_cast<u32>(input.x), static_cast<u32>(input.y), static_cast<u32>(input.z),
                          static_cast<u32>(input.w)};
    u32 largest = 0;  // as integers, NaN is the largest of all
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, held ? pairs[i] & 0x7fff7fffu : 0);
#pragma unroll
    for (int other = 8; other; other /= 2) largest = __vmaxu2(largest, __shfl_xor_sync(ALL, largest, other));
    scale = __fdiv_rn(from_half(max(largest & 0xffff, largest >> 16)), 448.0f);
    if (scale < 1.17549435e-38f) scale = 1.17549435e-38f;
    const bool plain = scale > 1e-30f && scale < 1e30f && (__float_as_uint(scale) & 0x7fffff) != 0x7fffff;
    const float inverse = __fdiv_rn(1.0f, scale);
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float x = from_half(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff);
        float quotient = x * inverse;
        quotient = __fmaf_rn(__fmaf_rn(-scale, quotient, x), inverse, quotient);
        quotient = __fmaf_rn(__fmaf_rn(-scale, quotient, x), inverse, quotient);
        // The corrections lose the sign of a zero.
        value[i] = __uint_as_float((__float_as_uint(quotient) & 0x7fffffff) | (__float_as_uint(x) & 0x80000000));
    }
    if (!plain) {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            value[i] = __fdiv_rn(from_half(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff), scale);
    }
    return {pack_e4m3(value[0], value[1]) | pack_e4m3(value[2], value[3]) << 16,
            pack_e4m3(value[4], value[5]) | pack_e4m3(value[6], value[7]) << 16};
}

// By all lanes: a row in shared memory, D values of 16 bits, to e4m3 and its scales.
__device__ __forceinline__ void quantize_row(const char* input, char* output, float* scales) {
    constexpr int VECTORS = D / 8;
    const int lane = lane_index();
#pragma unroll 4
    for (int begin = 0; begin < VECTORS; begin += 32) {
        const int vector = begin + lane;
        const bool held = vector < VECTORS;  // all or none of a block's 16 lanes
        int4 values = {0, 0, 0, 0};
        if (held) values = reinterpret_cast<const int4*>(input)[vector];
        float scale;
        const uint2 bytes = quantize(values, held, scale);
        if (!held) continue;
        reinterpret_cast<uint2*>(output)[vector] = bytes;
        if (lane % 16 == 0) scales[vector / 16] = scale;
    }
}

// By all lanes: the scales of a token that was quantised before, from [D / 128, T_pad].
__device__ __forceinline__ void gather_scales(const Job& job, int token, float* scales) {
    const int stride = (job.tokens + 3) / 4 * 4;
    for (int block = lane_index(); block < BLOCKS; block += 32)
        scales[block] = job.x_scale[static_cast<i64>(block) * stride + token];
}

// Dispatch

// By all lanes: meta of a token to the ranks in the set; `at` is in lane r its place there.
__device__ __forceinline__ void send_meta(const Job& job, int token, u32 ranks, int at) {
    for (int word = lane_index(); word < (META_WORDS + 31) / 32 * 32; word += 32) {
        const int k = word < K ? word : word - K;
        int expert = -1;
        u32 weight = 0;
        if (word < 2 * K) {
            const INDEX id = job.topk_idx[static_cast<i64>(token) * K + k];
            if (id >= 0 && id < static_cast<INDEX>(W) * L) expert = static_cast<int>(id);
            if (word >= K) weight = __float_as_uint(job.topk_weight[static_cast<i64>(token) * K + k]);
        }
#pragma unroll
        for (int rank = 0; rank < W; ++rank) {
            if (!(ranks >> rank & 1)) continue;
            const i64 row = static_cast<i64>(job.rank) * C + __shfl_sync(ALL, at, rank);
            const bool here = expert >= 0 && expert / L == rank;
            u32 value = word < K ? static_cast<u32>(here ? expert - rank * L : -1) : here ? weight : 0;
            if (word == 2 * K) value = token;
            if (word < META_WORDS) reinterpret_cast<u32*>(job.base[rank] + META_AT)[row * META_WORDS + word] = value;
        }
    }
}

template <bool PLANS>
__device__ __forceinline__ void send_tokens(const Job& job) {
    sm90::let_later_kernels_start();
    sm90::wait_for_earlier_kernels();
    Channel& mine = channel(job, job.rank, DISPATCH);
    const u64 exchange = mine.sent + 1;
    const int warps = blockDim.x / 32, warp = warp_index(), lane = lane_index();
    char* shared = dynamic_shared() + HEAD_ROOM;
    const int* place = job.place;
    const int* counts = job.counts;
    if (PLANS) {
        int* places = reinterpret_cast<int*>(shared);
        shared += PLACES_BYTES;
        make_plan(job, places, head().counts, head().by_warp);
        if (blockIdx.x == 0) {
            for (int i = threadIdx.x; i < job.tokens * W; i += blockDim.x) job.place[i] = places[i];
            if (threadIdx.x < W) job.counts[threadIdx.x] = head().counts[threadIdx.x];
        }
        place = places;
        counts = head().counts;
    }
    const u32 barrier = own_barrier();
    char* input = shared + warp * SENDER_BYTES;
    char* output = QUANTIZES ? input + TOKEN_BYTES : input;
    float* scales = reinterpret_cast<float*>(output + ROW_BYTES);
    const u32 input_address = sm90::shared_address(input), output_address = sm90::shared_address(output);
    if (!await_all(job, DISPATCH_START, mine.freed, exchange - 1)) return;

    u32 phase = 0;
    for (int token = warp * gridDim.x + blockIdx.x; token < job.tokens; token += gridDim.x * warps) {
        const int at = lane < W ? place[token * W + lane] : -1;
        const u32 ranks = __ballot_sync(ALL, at >= 0);
        if (!ranks) continue;
        bulk_wait_read();
        __syncwarp();
        begin_load(job.x + token * job.x_stride, barrier, input_address, TOKEN_BYTES);
        if (FP8 && !QUANTIZES) gather_scales(job, token, scales);
        if (job.topk_idx) send_meta(job, token, ranks, at);
        sm90::barrier_wait(barrier, phase);
        phase ^= 1;
        if (FP8) {
            if (QUANTIZES) quantize_row(input, output, scales);
            sm90::fence_async();
            __syncwarp();
        }
        if (at < 0) continue;
        const i64 row = static_cast<i64>(job.rank) * C + at;
        bulk_store(job.base[lane] + ROWS_AT + row * ROW_BYTES, output_address, ROW_BYTES);
        if (FP8) bulk_store(job.base[lane] + SCALES_AT + row * SCALE_BYTES, output_address + ROW_BYTES, SCALE_BYTES);
        bulk_commit();
    }
    bulk_wait_written();
    if (!is_last_cta(&mine.senders_done, &head().note)) return;
    const int peer = threadIdx.x;
    if (peer < W) raise_release(&channel(job, peer, DISPATCH).ready[job.rank], flag_value(exchange, counts[peer]));
    if (peer == 0) mine.sent = exchange;
}

// Meta of every row of the stage into ids, weights and source_token; rows past what arrived are unused.
__device__ __forceinline__ void unpack_meta(const Job& job, const int* counts) {
    const u32* meta = reinterpret_cast<const u32*>(job.base[job.rank] + META_AT);
    const int threads = gridDim.x * blockDim.x;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < ROWS * K; i += threads) {
        const int row = i / K, k = i % K;
        const bool used = row % C < counts[row / C];
        const u32* words = meta + static_cast<i64>(row) * META_WORDS;
        job.ids[i] = used ? static_cast<int>(load_arrived(words + k)) : -1;
        job.weights[i] = used ? __uint_as_float(load_arrived(words + K + k)) : 0.0f;
        if (k == 0) job.source_token[row] = used ? static_cast<int>(load_arrived(words + 2 * K)) : -1;
    }
}

// Scales of the stage, a row's together, into [D / 128, SCALE_ROWS]; zeros for unused rows and padding.
__device__ __forceinline__ void unpack_scales(const Job& job, const int* counts) {
    constexpr int QUADS = (BLOCKS + 3) / 4, GROUPS = (SCALE_ROWS + 31) / 32;
    const char* scales = job.base[job.rank] + SCALES_AT;
    const int warps = gridDim.x * (blockDim.x / 32);
    for (int i = warp_index() * gridDim.x + blockIdx.x; i < GROUPS * QUADS; i += warps) {
        const int row = i / QUADS * 32 + lane_index(), quad = i % QUADS;
        if (row >= SCALE_ROWS) continue;
        int4 four = {0, 0, 0, 0};
        if (row < ROWS && row % C < counts[row / C])
            four = load_arrived(reinterpret_cast<const int4*>(scales + static_cast<i64>(row) * SCALE_BYTES) + quad);
        const int words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (quad * 4 + j < BLOCKS)
                job.scale[static_cast<i64>(quad * 4 + j) * SCALE_ROWS + row] = __int_as_float(words[j]);
    }
}

__device__ __forceinline__ void copy_rows(const Job& job, const int* counts) {
    constexpr int VECTORS = ROW_BYTES / 16;
    const char* stage = job.base[job.rank] + ROWS_AT;
    const int warps = gridDim.x * (blockDim.x / 32);
    for (int row = warp_index() * gridDim.x + blockIdx.x; row < ROWS; row += warps) {
        if (row % C >= counts[row / C]) continue;
        const int4* from = reinterpret_cast<const int4*>(stage + static_cast<i64>(row) * ROW_BYTES);
        int4* to = reinterpret_cast<int4*>(job.rows + static_cast<i64>(row) * ROW_BYTES);
#pragma unroll 4
        for (int vector = lane_index(); vector < VECTORS; vector += 32) to[vector] = load_arrived(from + vector);
    }
}

__device__ __forceinline__ void free_stage(const Job& job, int peer, u64 exchange) {
    raise_release(&channel(job, peer, DISPATCH).freed[job.rank], exchange);
}

extern "C" __global__ void __launch_bounds__(1024) plan(const __grid_constant__ Job job) {
    sm90::let_later_kernels_start();
    make_plan(job, job.place, job.counts, head().by_warp);
}

extern "C" __global__ void __launch_bounds__(512) dispatch_start(const __grid_constant__ Job job) {
    send_tokens<false>(job);
}

extern "C" __global__ void __launch_bounds__(512) dispatch_start_planning(const __grid_constant__ Job job) {
    send_tokens<true>(job);
}

extern "C" __global__ void __launch_bounds__(512) dispatch_wait(const __grid_constant__ Job job) {
    Channel& mine = channel(job, job.rank, DISPATCH);
    const u64 exchange = mine.received + 1;
    int* counts = head().counts;
    if (await_all(job, DISPATCH_WAIT, mine.ready, flag_value(exchange, 0))) {
        if (threadIdx.x < W) {
            const int count = static_cast<int>(load_acquire(&mine.ready[threadIdx.x]) & ((1 << FLAG_SHIFT) - 1));
            counts[threadIdx.x] = count;
            if (blockIdx.x == 0) job.arrived[threadIdx.x] = count;
        }
        __syncthreads();
        if (job.ids) unpack_meta(job, counts);
        if (FP8) unpack_scales(job, counts);
        if (job.rows) copy_rows(job, counts);
        if (is_last_cta(&mine.readers_done, &head().note)) {
            if (job.rows && threadIdx.x < W) free_stage(job, threadIdx.x, exchange);
            if (threadIdx.x == 0) mine.received = exchange;
        }
    }
    sm90::wait_for_earlier_kernels();  // what comes after this kernel comes after dispatch_start too
}

extern "C" __global__ void __launch_bounds__(64) release(const __grid_constant__ Job job) {
    if (threadIdx.x < W) free_stage(job, threadIdx.x, channel(job, job.rank, DISPATCH).received);
}

// Combine

extern "C" __global__ void __launch_bounds__(512) combine_start(const __grid_constant__ Job job) {
    sm90::let_later_kernels_start();
    sm90::wait_for_earlier_kernels();
    Channel& mine = channel(job, job.rank, COMBINE);
    const u64 exchange = mine.sent + 1;
    const int warp = warp_index(), lane = lane_index(), warps = gridDim.x * (blockDim.x / 32);
    const u32 barrier = own_barrier();
    const u32 buffer = sm90::shared_address(dynamic_shared() + HEAD_ROOM + warp * RETURN_BYTES);
    int* counts = head().counts;
    if (threadIdx.x < W) counts[threadIdx.x] = job.arrived[threadIdx.x];
    if (!await_all(job, COMBINE_START, mine.freed, exchange - 1)) return;

    const auto begin_of = [&](int rank, int part) { return counts[rank] * part / job.chunks; };
    // By all lanes, once this warp's stores of a chunk are complete.
    const auto announce = [&](int chunk) {
        __syncwarp();
        u32 before = 0;
        if (lane == 0) before = count_arrival(&mine.chunk_done[chunk]);
        if (__shfl_sync(ALL, before, 0) != warps - 1) return;
        // All warps have finished this chunk and so those before it. Whoever raises a flag last can't lower it.
        const int peer = lane;
        if (peer < W) {
            const u64 value = flag_value(exchange, begin_of(peer, chunk + 1));
            raise_release(&channel(job, peer, COMBINE).ready[job.rank], value);
        }
        if (chunk < job.chunks - 1) return;
        if (job.frees_stage && peer < W) free_stage(job, peer, channel(job, job.rank, DISPATCH).received);
        if (lane < job.chunks) mine.chunk_done[lane] = 0;
        if (lane == 0) mine.sent = exchange;
    };

    u32 phase = 0;
    int unannounced = -1;  // chunk whose stores may be on their way while the next row is loaded
    for (int chunk = 0; chunk <= job.chunks; ++chunk) {  // none lies in the last turn, which announces the last chunk
        int most = 0;
        for (int rank = 0; chunk < job.chunks && rank < W; ++rank)
            most = max(most, begin_of(rank, chunk + 1) - begin_of(rank, chunk));
        for (int i = warp * gridDim.x + blockIdx.x; i < most * W; i += warps) {
            const int rank = (i + i / W) % W;  // all warps meet all ranks, however uneven
            const int at = begin_of(rank, chunk) + i / W;
            if (at >= begin_of(rank, chunk + 1)) continue;
            const i64 row = static_cast<i64>(rank) * C + at;
            bulk_wait_read();
            __syncwarp();
            begin_load(job.x + row * job.x_stride, barrier, buffer, INPUT_BYTES);
            const i64 back = static_cast<i64>(job.rank) * C + job.source_token[row];
            if (job.extra) {
                float* extra = reinterpret_cast<float*>(job.base[rank] + EXTRA_AT) + back * K;
                for (int k = lane; k < K; k += 32) extra[k] = job.extra[row * K + k];
            }
            sm90::barrier_wait(barrier, phase);
            phase ^= 1;
            if (lane == 0) {
                bulk_store(job.base[rank] + BACK_AT + back * INPUT_BYTES, buffer, INPUT_BYTES);
                bulk_commit();
            }
            if (unannounced < 0) continue;
            bulk_wait_written_before();
            announce(unannounced);
            unannounced = -1;
        }
        if (unannounced >= 0) {
            bulk_wait_written();
            announce(unannounced);
        }
        unannounced = chunk;
    }
}

// Sum over the ranks of a set of the vectors of 8 values, STEP at a time, that begin at `vector`, 32 apart.
template <int STEP>
__device__ __forceinline__ void sum_vectors(const Job& job, int token, u32 ranks, int vector, int end) {
    const char* back = job.base[job.rank] + BACK_AT;
    float sum[STEP][8] = {};
#pragma unroll
    for (int rank = 0; rank < W; ++rank) {
        if (!(ranks >> rank & 1)) continue;
        const i64 row = static_cast<i64>(rank) * C + token;
        const int4* from = reinterpret_cast<const int4*>(back + row * INPUT_BYTES);
        int4 values[STEP];
#pragma unroll
        for (int j = 0; j < STEP; ++j)
            if (vector + 32 * j < end) values[j] = load_arrived(from + vector + 32 * j);
#pragma unroll
        for (int j = 0; j < STEP; ++j) {
            const u32 pairs[4] = {static_cast<u32>(values[j].x), static_cast<u32>(values[j].y),
                                  static_cast<u32>(values[j].z), static_cast<u32>(values[j].w)};
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[j][i] += from_half(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff);
        }
    }
    int4* to = reinterpret_cast<int4*>(job.y + static_cast<i64>(token) * INPUT_BYTES);
#pragma unroll
    for (int j = 0; j < STEP; ++j) {
        if (vector + 32 * j >= end) continue;
        const float* s = sum[j];
        to[vector + 32 * j] = {static_cast<int>(pack_half(s[0], s[1])), static_cast<int>(pack_half(s[2], s[3])),
                               static_cast<int>(pack_half(s[4], s[5])), static_cast<int>(pack_half(s[6], s[7]))};
    }
}

extern "C" __global__ void __launch_bounds__(512) combine_wait(const __grid_constant__ Job job) {
    Channel& mine = channel(job, job.rank, COMBINE);
    const u64 exchange = mine.received + 1;
    const int lane = lane_index(), warps = gridDim.x * (blockDim.x / 32);
    constexpr int VECTORS = D / 8, STEP = 4;
    const float* extra = reinterpret_cast<const float*>(job.base[job.rank] + EXTRA_AT);
    bool fine = !load_relaxed(job.failed);
    u64 seen = 0;  // in lane r, the flag of rank r
    for (int i = warp_index() * gridDim.x + blockIdx.x; fine && i < job.tokens * job.parts; i += warps) {
        const int token = i / job.parts, part = i % job.parts;
        const int at = lane < W ? job.place[token * W + lane] : -1;
        const u32 ranks = __ballot_sync(ALL, at >= 0);
        const u64 wanted = at >= 0 ? flag_value(exchange, at + 1) : 0;
        if (seen < wanted) seen = await(job, COMBINE_WAIT, lane, mine.ready + lane, wanted);
        fine = __all_sync(ALL, seen >= wanted);
        if (!fine) break;
        const int begin = VECTORS * part / job.parts, end = VECTORS * (part + 1) / job.parts;
        for (int vector = begin + lane; vector < end; vector += 32 * STEP)
            sum_vectors<STEP>(job, token, ranks, vector, end);
        if (!job.extra_sum || part) continue;
        for (int k = lane; k < K; k += 32) {
            float sum = 0.0f;
            for (int rank = 0; rank < W; ++rank)
                if (ranks >> rank & 1) {
                    const float* word = extra + (static_cast<i64>(rank) * C + token) * K + k;
                    sum += __uint_as_float(load_arrived(reinterpret_cast<const u32*>(word)));
                }
            job.extra_sum[static_cast<i64>(token) * K + k] = sum;
        }
    }
    if (__syncthreads_or(!fine)) return;
    if (is_last_cta(&mine.readers_done, &head().note)) {
        if (threadIdx.x < W) raise_release(&channel(job, threadIdx.x, COMBINE).freed[job.rank], exchange);
        if (threadIdx.x == 0) mine.received = exchange;
    }
    sm90::wait_for_earlier_kernels();
}
