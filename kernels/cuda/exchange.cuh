// What the kernels of expert parallelism share: the layout of a slot, its flags, waiting with a time limit, the plan.
//
// Slot     One slot of the arena serves one exchange at a time, a dispatch and a combine; it has the same layout on
//          each of the W ranks (kernels/exchange.py gives the offsets). It begins with two channels, one a direction.
// Stage    rows [W, C, D] and, quantised, scales [W, C, D / 128], meta [W, C, META_WORDS]: entry [r, s] is the s-th
//          token, in its order, that rank r sends here. meta: K local expert ids or -1, K weights, the token's number.
// Return   back [W, C, D] and extra [W, C, K]: entry [r, t] is what rank r sends back for token t of this rank.
// Protocol Sender, exchange number e: wait until each peer has freed e - 1; write; raise the peer's ready[me] to e and
//          the number of rows that are there. Receiver: wait for ready; read; raise the peer's freed[me] to e. Numbers
//          are counted by the kernels in `sent` and `received`: nothing is reset and the host knows none of them, so a
//          captured graph can be replayed. tests/kernels/exchange_model.py goes through the interleavings.
// Ordering All threads of a CTA finish their stores (bulk ones are waited for), meet at a barrier, one counts the
//          CTA's arrival (acquire and release), the last one raises the flags (release). Causality is transitive, so
//          the flag follows every store of every CTA.
// Failure  A wait that lasts longer than the limit writes a record into host memory that names the peer, then traps;
//          or, without trap, marks the arena as failed, and all later kernels on it return at once.
#pragma once

#include "peers.cuh"

using namespace peers;
using sm90::lane_index;

constexpr int W = WORLD, C = CAPACITY, D = WIDTH, K = TOP_K, L = LOCAL_EXPERTS, ROWS = W * C;
constexpr bool FP8 = QUANTIZED, QUANTIZES = QUANTIZED && !PREQUANTIZED;  // QUANTIZES: by dispatch_start
constexpr int INPUT_BYTES = D * 2, ROW_BYTES = FP8 ? D : D * 2;
constexpr int TOKEN_BYTES = FP8 && !QUANTIZES ? ROW_BYTES : INPUT_BYTES;  // of a row that dispatch_start is given
constexpr int BLOCKS = (D + 127) / 128, SCALE_BYTES = FP8 ? (BLOCKS * 4 + 15) / 16 * 16 : 0;
constexpr int META_WORDS = (2 * K + 1 + 3) / 4 * 4;
constexpr int SCALE_ROWS = (ROWS + 3) / 4 * 4;  // M_pad of the scales that the GEMM reads
constexpr int FLAG_SHIFT = 24;                  // a ready flag is the exchange's number, then the rows that arrived
constexpr u32 ALL = 0xffffffffu;

static_assert(W >= 1 && W <= 8, "a slot has flags for 8 ranks");
static_assert(C < 1 << FLAG_SHIFT, "rows of a flag have 24 bits");
static_assert(INPUT_BYTES % 16 == 0, "bulk copies move multiples of 16 bytes");
static_assert(!FP8 || D % 128 == 0, "a scale belongs to 128 columns");

// Of one direction. ready and freed are written by peers, the rest by this rank alone.
struct alignas(128) Channel {
    u64 ready[16];  // [r]: exchange << 24 | rows of rank r that have arrived
    u64 freed[16];  // [r]: the last exchange of which rank r has read all that this rank sent
    u64 sent, received;
    u32 senders_done, readers_done, chunk_done[MAX_CHUNKS], pad[26 - MAX_CHUNKS];
};
static_assert(sizeof(Channel) == CHANNEL_BYTES, "the host counts otherwise");

enum Direction { DISPATCH, COMBINE };
enum Operation { DISPATCH_START = 1, DISPATCH_WAIT, COMBINE_START, COMBINE_WAIT };

struct Job {
    char* base[8];  // the slot on each rank, as this rank sees it
    u32* record;    // host memory: operation, peer, slot, rank, number waited for (2 words), number seen (2 words)
    u32* failed;
    u64 timeout_ns;
    const char* x;  // rows to send: of tokens [T, D], or [W * C, D] back
    i64 x_stride;   // bytes
    const float* x_scale;  // [D / 128, T_pad] of tokens that were quantised before
    const INDEX* topk_idx;
    const float* topk_weight;
    int* place;         // [T, W]: entry of a token in the stage of each rank, -1 where it isn't sent
    int* counts;        // [W]: tokens sent to each rank
    int* source_token;  // [W * C], -1 where a row is unused
    int* arrived;       // [W]: rows that came from each rank
    char* rows;         // [W * C, D], null for a view of the stage
    float* scale;       // [D / 128, SCALE_ROWS]
    int* ids;           // [W * C, K]
    float* weights;     // [W * C, K]
    const float* extra;  // [W * C, K] to send back beside the rows, or null
    float* extra_sum;    // [T, K]
    char* y;             // [T, D]
    int rank, slot, tokens, trap, chunks, parts, frees_stage;
};

__device__ __forceinline__ Channel& channel(const Job& job, int rank, Direction direction) {
    return reinterpret_cast<Channel*>(job.base[rank])[direction];
}

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

__device__ __forceinline__ u64 flag_value(u64 exchange, int rows) { return exchange << FLAG_SHIFT | rows; }

// The 16-bit format of the tokens.
__device__ __forceinline__ float from_half(u32 bits) { return BFLOAT16 ? from_bf16(bits) : from_fp16(bits); }

__device__ __forceinline__ u32 pack_half(float low, float high) {
    return BFLOAT16 ? sm90::pack_bf16(low, high) : pack_fp16(low, high);
}

// Waiting

// Writes the record, once for the whole arena, and gives up.
__device__ __forceinline__ void fail(const Job& job, Operation operation, int peer, u64 wanted, u64 seen) {
    if (exchange_relaxed(job.failed, 1) == 0) {
        const u32 words[7] = {static_cast<u32>(peer),        static_cast<u32>(job.slot),
                              static_cast<u32>(job.rank),    static_cast<u32>(wanted),
                              static_cast<u32>(wanted >> 32), static_cast<u32>(seen),
                              static_cast<u32>(seen >> 32)};
#pragma unroll
        for (int i = 0; i < 7; ++i) store_relaxed(job.record + 1 + i, words[i]);
        store_release(job.record, operation);
    }
    if (job.trap) trap();
}

// The flag once it is at least `wanted`; less after the time limit, or when another thread has given up.
__device__ __forceinline__ u64 await(const Job& job, Operation operation, int peer, const u64* flag, u64 wanted) {
    u64 seen = load_acquire(flag);
    if (seen >= wanted) return seen;
    const u64 begin = nanoseconds();
    for (u32 round = 1; (seen = load_acquire(flag)) < wanted; ++round) {
        back_off(20 * (1 + warp_index()));  // the more warps of a CTA wait for a flag, the less each one asks
        if (round % 64) continue;
        if (load_relaxed(job.failed)) return seen;
        if (nanoseconds() - begin > job.timeout_ns) {
            fail(job, operation, peer, wanted, seen);
            return seen;
        }
    }
    return seen;
}

// For all threads of a CTA: false where the arena has failed or a peer's flag stays below `wanted`.
__device__ __forceinline__ bool await_all(const Job& job, Operation operation, const u64* flags, u64 wanted) {
    bool bad = threadIdx.x == 32 && load_relaxed(job.failed);
    const int peer = threadIdx.x;
    if (peer < W) bad = await(job, operation, peer, flags + peer, wanted) < wanted;
    return !__syncthreads_or(bad);
}

// For all threads of a CTA, once all it has to do is done: true in the last CTA of the grid.
__device__ __forceinline__ bool is_last_cta(u32* counter, int* note) {
    __syncthreads();
    if (threadIdx.x == 0) {
        const bool last = count_arrival(counter) == gridDim.x - 1;
        if (last) *counter = 0;
        *note = last;
    }
    __syncthreads();
    return *note;
}

// The plan

// Set of ranks that hold an expert of this token; ids outside the experts name none.
__device__ __forceinline__ u32 ranks_of(const Job& job, int token) {
    u32 ranks = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const INDEX id = job.topk_idx[static_cast<i64>(token) * K + k];
        if (id >= 0 && id < static_cast<INDEX>(W) * L) ranks |= 1u << static_cast<u32>(id) / L;
    }
    return ranks;
}

// For all threads of a CTA: place [T, W] of every token and counts [W]. by_warp: shared memory for W numbers a warp.
// Warps own runs of groups of 32 tokens; counts of the warps before, then ballots, give each token's place.
__device__ __forceinline__ void make_plan(const Job& job, int* place, int* counts, int* by_warp) {
    const int warps = blockDim.x / 32, warp = warp_index(), lane = lane_index();
    const int groups = (job.tokens + 31) / 32, each = (groups + warps - 1) / warps;
    const int begin = warp * each, end = min(begin + each, groups);
    int total = 0;  // of rank `lane`, over this warp's tokens
    for (int group = begin; group < end; ++group) {
        const int token = group * 32 + lane;
        const u32 ranks = token < job.tokens ? ranks_of(job, token) : 0;
#pragma unroll
        for (int rank = 0; rank < W; ++rank) {
            const u32 senders = __ballot_sync(ALL, ranks >> rank & 1);
            if (lane == rank) total += __popc(senders);
        }
    }
    if (lane < W) by_warp[warp * W + lane] = total;
    __syncthreads();
    int next = 0;  // place of the next token for rank `lane`
    if (lane < W)
        for (int before = 0; before < warp; ++before) next += by_warp[before * W + lane];
    if (warp == warps - 1 && lane < W) counts[lane] = next + total;
    for (int group = begin; group < end; ++group) {
        const int token = group * 32 + lane;
        const u32 ranks = token < job.tokens ? ranks_of(job, token) : 0;
#pragma unroll
        for (int rank = 0; rank < W; ++rank) {
            const u32 senders = __ballot_sync(ALL, ranks >> rank & 1);
            const int at = __shfl_sync(ALL, next, rank) + __popc(senders & ((1u << lane) - 1));
            if (token < job.tokens) place[token * W + rank] = ranks >> rank & 1 ? at : -1;
            if (lane == rank) next += __popc(senders);
        }
    }
    __syncthreads();
}
