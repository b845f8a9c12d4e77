// Which tiles a cluster computes, found on the device: the work is cut into units (a tile, or the two tiles of a
// cluster of two), units are numbered group by group, and cluster c of C takes units c, c + C, c + 2C, ...
//
// Only the producer warp runs this, all 32 lanes together: each lane holds one group, and a scan over the lanes says
// where a group's units begin. Both CTAs of a cluster walk the same units, so they always agree on the number of steps.
#pragma once

#include "sm90.cuh"

enum class Layout { DENSE, ENDS, MASKED };
enum class Share { NONE, X, W };  // what the two CTAs of a cluster have in common: no cluster, rows of x, rows of w

// What the host passes by value beside the tensor maps.
struct Problem {
    const float* x_scale;       // [slabs, k_blocks, m_pad], m contiguous; rows from m to m_pad are never used
    long long x_scale_slab;     // its strides in elements
    long long x_scale_block;
    const float* w_scale;       // [groups, ceil(n / 128), k_blocks], k contiguous
    long long w_scale_group;    // its strides in elements
    long long w_scale_row;
    const int* bounds;          // ENDS: ends [groups]; MASKED: counts [groups]; DENSE: unused
    unsigned short* y;          // bf16 [slabs, m, n]
    long long y_slab;           // its strides in elements
    long long y_row;
    int m, m_pad, n, k_blocks, groups;  // m: rows of a slab
    int raster;                 // rows of units that are walked together, for the L2 cache
};

enum Kind : int { COMPUTE = 0, ZERO = 1, END = 2 };

struct Tile {
    int row, row_end;  // first row, and one past the last row that may be written
    int column;
    int group;         // of w
    Kind kind;         // ZERO: rows that belong to no group
};

template <class S>
class Scheduler {
public:
    __device__ Scheduler(const Problem& problem, int first, int step, int rank)
        : problem(problem), unit(first), step(step), rank(rank), lane(sm90::lane_index()) {
        units_n = ceil_div(ceil_div(problem.n, S::BN), S::SHARE == Share::X ? 2 : 1);
        if constexpr (S::LAYOUT == Layout::DENSE) {
            start = 0, end = problem.m;
            inclusive = units(end - start);
        } else {
            load_groups();
        }
    }

    // The next tile of this CTA; false when there is none. One with row >= row_end or column >= n has nothing to
    // compute: its CTA only takes part in the loads of the other.
    __device__ bool next(Tile& tile) {
        const int wanted = unit;
        unit += step;
        if constexpr (S::LAYOUT == Layout::DENSE) {
            if (wanted >= inclusive) return false;
            locate(tile, wanted, start, end);
            tile.group = 0, tile.kind = COMPUTE;
        } else {
            while (wanted >= before + last_inclusive()) {
                if (first_group + 32 >= listed()) return false;
                before += last_inclusive();
                first_group += 32;
                load_groups();
            }
            const int local = wanted - before;
            const int owner = __ffs(__ballot_sync(~0u, local < inclusive)) - 1;
            const int from = __shfl_sync(~0u, start, owner), to = __shfl_sync(~0u, end, owner);
            const int units_to_owner = __shfl_sync(~0u, inclusive, owner);
            locate(tile, local - (units_to_owner - units(to - from)), from, to);
            tile.group = first_group + owner;
            tile.kind = tile.group < problem.groups ? COMPUTE : ZERO;
        }
        return true;
    }

private:
    static __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

    // Groups on the list: with offsets, the rows past the last group stand for one more.
    __device__ int listed() const { return problem.groups + (S::LAYOUT == Layout::ENDS ? 1 : 0); }

    __device__ int last_inclusive() const { return __shfl_sync(~0u, inclusive, 31); }

    // Rows of units that so many rows of x make, and all their units.
    static __device__ int units_m(int rows) { return ceil_div(ceil_div(rows, S::BM), S::SHARE == Share::W ? 2 : 1); }
    __device__ int units(int rows) const { return units_m(rows) * units_n; }

    __device__ void load_groups() {
        const int group = first_group + lane;
        start = end = 0;
        if constexpr (S::LAYOUT == Layout::ENDS) {
            if (group <= problem.groups) {
                start = group == 0 ? 0 : max(problem.bounds[group - 1], 0);
                end = group == problem.groups ? problem.m : min(problem.bounds[group], problem.m);
            }
        } else {
            if (group < problem.groups) end = min(problem.bounds[group], problem.m);
        }
        end = max(start, end);
        inclusive = units(end - start);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int lower = __shfl_up_sync(~0u, inclusive, distance);
            if (lane >= distance) inclusive += lower;
        }
    }

    // Place of a group's unit: bands of `raster` rows of units, each walked down its columns.
    __device__ void locate(Tile& tile, int local, int from, int to) const {
        const int band = local / (problem.raster * units_n);
        const int inside = local - band * problem.raster * units_n;
        const int height = min(units_m(to - from) - band * problem.raster, problem.raster);
        int row_tile = band * problem.raster + inside % height, column_tile = inside / height;
        if (S::SHARE == Share::W) row_tile = 2 * row_tile + rank;
        if (S::SHARE == Share::X) column_tile = 2 * column_tile + rank;
        tile.row = from + row_tile * S::BM;
        tile.row_end = to;
        tile.column = column_tile * S::BN;
    }

    const Problem& problem;
    int unit, step, rank, lane, units_n;
    int first_group = 0, before = 0;  // the 32 groups at hand, and the units of all groups before them
    int start, end, inclusive;        // this lane's group: its rows, and the units up to its end
};
