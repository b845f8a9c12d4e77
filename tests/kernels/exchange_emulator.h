// Runs the kernels of kernels/cuda/exchange.cu on a CPU: every thread of every CTA of every rank is a fiber, a
// scheduler picks the next one at random, and what the hardware does asynchronously is done as early or late as it may.
//
// It takes the place of sm90.cuh and peers.cuh. A fiber gives way where threads meet (warp and CTA barriers, votes,
// shuffles) and where they poll. A bulk store reads its source at bulk_wait_read at the latest and writes its
// destination at bulk_wait_written at the latest, each at a random time; a bulk load happens between its issue and the
// wait for it. So a missing wait shows as wrong bytes for some seed. Ordinary stores are seen at once: their order is
// the business of exchange_model.py. Time is the number of switches.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct int4 {
    int x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
using std::max;
using std::min;

namespace emulator {

using u32 = unsigned int;
using u64 = unsigned long long;

struct Copy {
    char* to;
    const char* from;
    u32 bytes;
    std::vector<char> held;  // once the source has been read
    bool read = false;
};

struct Meeting {  // of the threads of a warp or a CTA
    int size = 0, here = 0;
    u64 round = 0;
    std::vector<u64> values[2];
};

struct Cta;
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Cta* cta;
    int index;
    bool done = false;
    std::function<bool()> blocked;  // empty where it can run
    std::vector<Copy> stores;
};

struct Launch;
struct Cta {
    Launch* launch;
    int index;
    std::vector<char> shared;
    Meeting all;
    std::vector<Meeting> warps;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Copy> loads[16];  // by the barrier's place
};

struct Launch {
    int ctas, threads;
    u64 shared_bytes;
    bool overlapped;
    std::function<void()> body;
    std::vector<std::unique_ptr<Cta>> running;
    bool started = false, done = false;
    int triggers = 0, left = 0;
    Launch* before = nullptr;
};

inline Thread* current;
inline ucontext_t scheduler;
inline std::mt19937 random_bits;
inline u64 now;
inline bool trapped;
inline int mistake;  // which planted one to make, 0 for none

inline bool coin() { return random_bits() & 1; }
inline void give_way() { swapcontext(&current->context, &scheduler); }
inline void block(std::function<bool()> until) {
    while (!until()) {
        current->blocked = until;
        give_way();
    }
}

// Returns once all have come, with what they brought; the values stay until the meeting after the next.
inline const std::vector<u64>& meet(Meeting& meeting, int place, u64 value) {
    const u64 round = meeting.round;
    auto& values = meeting.values[round % 2];
    values.resize(meeting.size);
    values[place] = value;
    if (++meeting.here == meeting.size) {
        meeting.here = 0;
        ++meeting.round;
        give_way();
    } else {
        block([&meeting, round] { return meeting.round != round; });
    }
    return values;
}

inline const std::vector<u64>& meet_warp(u64 value) {
    return meet(current->cta->warps[current->index / 32], current->index % 32, value);
}
inline const std::vector<u64>& meet_cta(u64 value) { return meet(current->cta->all, current->index, value); }

struct Index {
    int x;
};
inline void read(Copy& copy) {
    if (!copy.read) copy.held.assign(copy.from, copy.from + copy.bytes);
    copy.read = true;
}
inline void write(Copy& copy) {
    read(copy);
    std::memcpy(copy.to, copy.held.data(), copy.bytes);
}

}  // namespace emulator

#define threadIdx (emulator::Index{emulator::current->index})
#define blockIdx (emulator::Index{emulator::current->cta->index})
#define blockDim (emulator::Index{emulator::current->cta->launch->threads})
#define gridDim (emulator::Index{emulator::current->cta->launch->ctas})

inline void __syncwarp() { emulator::meet_warp(0); }
inline void __syncthreads() { emulator::meet_cta(0); }
inline bool __syncthreads_or(bool value) {
    const auto& all = emulator::meet_cta(value);
    return std::any_of(all.begin(), all.end(), [](auto v) { return v; });
}
inline bool __all_sync(unsigned, bool value) {
    const auto& all = emulator::meet_warp(value);
    return std::all_of(all.begin(), all.end(), [](auto v) { return v; });
}
inline unsigned __ballot_sync(unsigned, bool value) {
    const auto& all = emulator::meet_warp(value);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i] != 0) << i;
    return bits;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return static_cast<T>(emulator::meet_warp(static_cast<emulator::u64>(value))[lane]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = emulator::current->index % 32;
    return static_cast<T>(emulator::meet_warp(static_cast<emulator::u64>(value))[lane ^ mask]);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __vmaxu2(unsigned a, unsigned b) {
    return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16;
}
inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline unsigned __float_as_uint(float x) {
    unsigned y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

namespace sm90 {

using u16 = unsigned short;
using emulator::u32;
using emulator::u64;

inline u32 lane_index() { return emulator::current->index % 32; }
inline void let_later_kernels_start() {
    if (emulator::current->index == 0) ++emulator::current->cta->launch->triggers;
}
inline void wait_for_earlier_kernels() {
    emulator::Launch* before = emulator::current->cta->launch->before;
    if (before) emulator::block([before] { return before->done; });
}
inline u32 shared_address(const void* pointer) {
    return static_cast<u32>(static_cast<const char*>(pointer) - emulator::current->cta->shared.data());
}
inline void barrier_init(u32 barrier, u32) { std::memset(&emulator::current->cta->shared[barrier], 0, 8); }
inline void fence_barrier_init() {}
inline void barrier_arrive_expecting(u32, u32) {}
inline void fence_async() {}

// The barrier's word counts the loads that have completed.
inline void finish_load(emulator::Cta* cta, u32 barrier) {
    auto& loads = cta->loads[barrier / 8];
    if (loads.empty()) return;
    emulator::write(loads.front());
    loads.erase(loads.begin());
    ++*reinterpret_cast<u64*>(&cta->shared[barrier]);
}
inline void bulk_load(const void* source, u32 barrier, u32 destination, u32 bytes) {
    emulator::Cta* cta = emulator::current->cta;
    std::memset(&cta->shared[destination], 0xff, bytes);  // nothing of it may be read before it is there
    cta->loads[barrier / 8].push_back({&cta->shared[destination], static_cast<const char*>(source), bytes, {}, false});
    if (emulator::coin()) finish_load(cta, barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
    emulator::Cta* cta = emulator::current->cta;
    const u64* completed = reinterpret_cast<u64*>(&cta->shared[barrier]);
    // As in hardware: returns where the phase of that parity isn't the current one.
    while ((*completed & 1) == parity) {
        if (emulator::coin()) finish_load(cta, barrier);
        emulator::give_way();
    }
}
inline u32 pack_bf16(float low, float high) {
    const auto round = [](float x) {
        const u32 bits = __float_as_uint(x);
        if (x != x) return 0x7fffu;
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return round(low) | round(high) << 16;
}

}  // namespace sm90

namespace peers {

using i64 = long long;
using sm90::u16;
using sm90::u32;
using sm90::u64;

inline u64 load_acquire(const u64* flag) {
    emulator::give_way();
    return *flag;
}
inline void raise_release(u64* flag, u64 value) {
    *flag = max(*flag, value);
    emulator::give_way();
}
inline u32 count_arrival(u32* counter) {
    emulator::give_way();
    return (*counter)++;
}
inline u32 exchange_relaxed(u32* word, u32 value) {
    const u32 before = *word;
    *word = value;
    return before;
}
inline u32 load_relaxed(const u32* word) { return *word; }
inline void store_relaxed(u32* word, u32 value) { *word = value; }
inline void store_release(u32* word, u32 value) { *word = value; }
inline int4 load_arrived(const int4* pointer) { return *pointer; }
inline u32 load_arrived(const u32* pointer) { return *pointer; }
inline void bulk_store(void* destination, u32 source, u32 bytes) {
    const char* from = &emulator::current->cta->shared[source];
    emulator::current->stores.push_back({static_cast<char*>(destination), from, bytes, {}, false});
}
inline void bulk_commit() {}
inline void bulk_wait_read() {
    if (emulator::mistake == 1) return;
    auto& stores = emulator::current->stores;
    for (auto& store : stores) emulator::read(store);
    if (!stores.empty() && emulator::coin()) emulator::write(stores[emulator::random_bits() % stores.size()]);
}
inline void bulk_wait_written() {
    if (emulator::mistake == 2) return;
    for (auto& store : emulator::current->stores) emulator::write(store);
    emulator::current->stores.clear();
}
inline void bulk_wait_written_before() {
    auto& stores = emulator::current->stores;
    if (emulator::mistake == 2 || stores.empty()) return;
    for (size_t i = 0; i + 1 < stores.size(); ++i) emulator::write(stores[i]);
    stores.erase(stores.begin(), stores.end() - 1);
}
inline u64 nanoseconds() { return emulator::now; }
inline void back_off(u32) { emulator::give_way(); }
inline void trap() { emulator::trapped = true; }
inline char* dynamic_shared() { return emulator::current->cta->shared.data(); }
inline float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }
inline float from_fp16(u32 bits) {
    const u16 half = static_cast<u16>(bits);
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return static_cast<float>(value);
}
inline u32 pack_fp16(float low, float high) {
    const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    u32 packed;
    std::memcpy(&packed, both, 4);
    return packed;
}
inline u32 e4m3(float x) {
    const u32 sign = __float_as_uint(x) >> 24 & 0x80;
    if (x != x) return 0x7f;
    const float magnitude = std::min(std::fabs(x), 448.0f);
    int exponent = magnitude > 0 ? std::max(std::ilogb(magnitude), -6) : -6;
    int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));  // of 2^(exponent - 3)
    if (steps == 16) steps = 8, ++exponent;
    return sign | (steps < 8 ? steps : (exponent + 7) << 3 | (steps - 8));
}
inline u32 pack_e4m3(float low, float high) { return e4m3(low) | e4m3(high) << 8; }

}  // namespace peers
