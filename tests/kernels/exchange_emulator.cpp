// The scheduler of exchange_emulator.h, and its entry: lists of launches, one a rank, run at the same time.
#include "exchange.cu"

using namespace emulator;

extern "C" {
struct Entry {
    int kernel, ctas, threads, overlapped;
    u64 shared;
    const Job* job;
};
}

static void begin_thread() {
    current->cta->launch->body();
    current->stores.clear();  // what nobody waited for is lost
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

static void (*const kernels[])(const Job) = {plan,    dispatch_start, dispatch_start_planning, dispatch_wait,
                                             release, combine_start,  combine_wait};

static void start(Launch& launch) {
    launch.started = true;
    launch.left = launch.ctas * launch.threads;
    for (int i = 0; i < launch.ctas; ++i) {
        auto cta = std::make_unique<Cta>();
        cta->launch = &launch;
        cta->index = i;
        cta->shared.assign(launch.shared_bytes + 8, char(0xa5));
        cta->all.size = launch.threads;
        cta->warps.resize(launch.threads / 32);
        for (auto& warp : cta->warps) warp.size = 32;
        for (int t = 0; t < launch.threads; ++t) {
            auto thread = std::make_unique<Thread>();
            thread->cta = cta.get();
            thread->index = t;
            thread->stack.reset(new char[1 << 16]);
            getcontext(&thread->context);
            thread->context.uc_stack.ss_sp = thread->stack.get();
            thread->context.uc_stack.ss_size = 1 << 16;
            thread->context.uc_link = nullptr;
            makecontext(&thread->context, begin_thread, 0);
            cta->threads.push_back(std::move(thread));
        }
        launch.running.push_back(std::move(cta));
    }
}

// 0: all launches ended; 1: not after `limit` switches; 2: trapped.
extern "C" int run_streams(const Entry* const* lists, const int* lengths, int ranks, unsigned seed, u64 limit,
                           int planted) {
    mistake = planted;
    random_bits.seed(seed);
    now = 0;
    trapped = false;
    std::vector<std::vector<std::unique_ptr<Launch>>> streams(ranks);
    for (int rank = 0; rank < ranks; ++rank)
        for (int i = 0; i < lengths[rank]; ++i) {
            const Entry& entry = lists[rank][i];
            auto launch = std::make_unique<Launch>();
            launch->ctas = entry.ctas;
            launch->threads = entry.threads;
            launch->shared_bytes = entry.shared;
            launch->overlapped = entry.overlapped;
            launch->before = i ? streams[rank].back().get() : nullptr;
            launch->body = [entry] { kernels[entry.kernel](*entry.job); };
            streams[rank].push_back(std::move(launch));
        }
    const int slow = seed % (ranks + 1);  // a rank that falls behind; for some seeds none
    for (;;) {
        std::vector<Thread*> ready;
        bool ended = true;
        for (int rank = 0; rank < ranks; ++rank)
            for (auto& launch : streams[rank]) {
                if (launch->done) continue;
                ended = false;
                Launch* before = launch->before;
                const bool may = !before || before->done ||
                                 (launch->overlapped && before->started && before->triggers == before->ctas);
                if (!launch->started && may) start(*launch);
                if (!launch->started) break;
                if (rank == slow && random_bits() % 16) continue;
                for (auto& cta : launch->running)
                    for (auto& thread : cta->threads)
                        if (!thread->done) ready.push_back(thread.get());
            }
        if (ended) return 0;
        std::shuffle(ready.begin(), ready.end(), random_bits);
        ready.resize(ready.size() - (ready.size() > 64 ? random_bits() % (ready.size() / 2) : 0));  // some stall
        for (Thread* thread : ready) {
            if (thread->blocked && !thread->blocked()) continue;
            thread->blocked = nullptr;
            current = thread;
            ++now;
            swapcontext(&scheduler, &thread->context);
            if (trapped) return 2;
            Launch* launch = thread->cta->launch;
            if (thread->done && --launch->left == 0) {
                launch->done = true;
                launch->running.clear();
                break;  // other threads of it are gone from memory
            }
        }
        if (now > limit) return 1;
    }
}
