// Memory that several GPUs share, one PTX instruction a function: flags with release and acquire across the system,
// bulk stores, the clock; and the number formats of what is sent. Nothing is decided here.
//
// All flags are 64-bit counters that only grow. A release orders everything that this thread has seen (its own writes,
// and those of threads that it has synchronised with) before the flag, an acquire everything after it.
#pragma once

#include "sm90.cuh"

namespace peers {

using i64 = long long;
using sm90::u16;
using sm90::u32;
using sm90::u64;

// Flags

__device__ __forceinline__ u64 load_acquire(const u64* flag) {
    u64 value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
    return value;
}

// Raises a flag of any GPU of the system to `value`, never lowers it.
__device__ __forceinline__ void raise_release(u64* flag, u64 value) {
    asm volatile("red.release.sys.global.max.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// Counts threads that arrive: what each has done before is seen by all that count after it.
__device__ __forceinline__ u32 count_arrival(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.sys.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

__device__ __forceinline__ u32 exchange_relaxed(u32* word, u32 value) {
    u32 before;
    asm volatile("atom.relaxed.sys.global.exch.b32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
    return before;
}

__device__ __forceinline__ u32 load_relaxed(const u32* word) {
    u32 value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void store_relaxed(u32* word, u32 value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ void store_release(u32* word, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// What a peer has written: read past the L1, which another kernel's lines may fill.
__device__ __forceinline__ int4 load_arrived(const int4* pointer) {
    int4 v;
    asm volatile("ld.global.cg.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(pointer));
    return v;
}

__device__ __forceinline__ u32 load_arrived(const u32* pointer) {
    u32 value;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(pointer));
    return value;
}

// Bulk stores: a run of bytes from shared memory to any GPU; addresses and size are multiples of 16.

__device__ __forceinline__ void bulk_store(void* destination, u32 source, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's bulk stores have read their sources, which may then be overwritten.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Until this thread's bulk stores are complete and ordered before its later releases.
__device__ __forceinline__ void bulk_wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;\nfence.proxy.async;" ::: "memory");
}

// The same for all groups of stores but the last.
__device__ __forceinline__ void bulk_wait_written_before() {
    asm volatile("cp.async.bulk.wait_group 1;\nfence.proxy.async;" ::: "memory");
}

// Time, waiting, giving up

__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

__device__ __forceinline__ void back_off(u32 nanoseconds) { __nanosleep(nanoseconds); }

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

__device__ __forceinline__ char* dynamic_shared() {
    extern __shared__ __align__(128) char bytes[];
    return bytes;
}

// Numbers

__device__ __forceinline__ float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float from_fp16(u32 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<u16>(bits)));
    return value;
}

__device__ __forceinline__ u32 pack_fp16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

}  // namespace peers
