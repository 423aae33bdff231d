// The machine behind emulate.h: fibers, barriers, warp exchange, asynchronous copies, matrix products.
#include "emulate.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include "launch.h"

namespace emulation {

dim3 grid_size, block_size;
Place place;
unsigned char* shared_memory;

namespace {

constexpr int LANES = 32;
constexpr size_t STACK = 64 << 10;

// ------------------------------------------------------------------------------------------------------------- fibers

#if defined(__x86_64__)
// Saves what a call must preserve, leaves this stack at *from and goes on where `to` was left.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

struct Context {
    void* stack = nullptr;
};
void prepare(Context& context, unsigned char* stack, void (*begin)()) {
    // As if `begin` had been about to run: its address below an aligned top, six saved registers below that.
    auto top = reinterpret_cast<void**>(stack + STACK) - 2;
    *top = reinterpret_cast<void*>(begin);
    context.stack = top - 6;
}
void go(Context& from, Context& to) { emulation_switch(&from.stack, to.stack); }
#else
// Elsewhere the C library's, which asks the kernel at every switch.
struct Context {
    ucontext_t context;
};
void prepare(Context& context, unsigned char* stack, void (*begin)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK;
    makecontext(&context.context, begin, 0);
}
void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// ------------------------------------------------------------------------------------------------------------ threads

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes;
    int group;
};

struct Warp {
    int lanes = 0;
    int arrived = 0;
    // Operations that all lanes have reached.
    long completed = 0;
    Together what = Together::SYNC;
    alignas(16) unsigned char buffers[2][LANES * EXCHANGE_STRIDE];
    // Of the operation that completed last.
    float result[2][16][8];
};

struct Thread {
    Context context;
    Place place;
    Warp* warp = nullptr;
    int lane = 0;
    // Operations of the warp, barriers of the block that this thread has begun.
    long operations = 0;
    long barriers = 0;
    bool done = false;
    std::vector<Copy> copies;
    int group = 0;
};

std::vector<Thread> threads;
std::vector<Warp> warps;
Context scheduler;
Thread* current = nullptr;
std::function<void()> kernel;
size_t shared_bytes;
int arrived_at_barrier;
long completed_barriers;
int returned;

void pause() { go(current->context, scheduler); }

[[noreturn]] void wrong(const char* what) {
    fail("block (%u, %u, %u), thread %u: %s", place.block.x, place.block.y, place.block.z, place.thread.x, what);
}

void begin_thread() {
    kernel();
    current->done = true;
    ++returned;
    pause();
}

bool waits(const Thread& t) { return t.barriers > completed_barriers || t.operations > t.warp->completed; }

// Runs the threads of a block in `order` until all are done.
void run_block(const std::vector<int>& order) {
    for (;;) {
        bool moved = false;
        for (size_t i = 0; i < order.size(); i += LANES) {
            // A warp goes on alone until its lanes wait for others.
            for (bool again = true; again;) {
                again = false;
                for (size_t j = i; j < std::min(i + LANES, order.size()); ++j) {
                    Thread& t = threads[order[j]];
                    if (t.done || waits(t)) continue;
                    current = &t;
                    place = t.place;
                    go(scheduler, t.context);
                    again = moved = true;
                }
            }
        }
        if (returned == static_cast<int>(threads.size())) return;
        if (!moved) {
            for (const Thread& t : threads) {
                if (t.done) continue;
                place = t.place;
                wrong("waits for ever: not all threads came to its barrier or warp operation");
            }
        }
    }
}

std::vector<int> thread_order(Order order, int count, unsigned seed) {
    std::vector<int> all(count);
    std::iota(all.begin(), all.end(), 0);
    if (order == Order::REVERSE) std::reverse(all.begin(), all.end());
    if (order == Order::SHUFFLED) {
        // Warps among themselves, and the lanes of each.
        uint64_t state = 0x9e3779b97f4a7c15u + seed;
        const auto below = [&](size_t n) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            return static_cast<size_t>(state >> 33) % n;
        };
        for (int w = 0; w + LANES <= count; w += LANES) {
            for (size_t i = LANES; i > 1; --i) std::swap(all[w + i - 1], all[w + below(i)]);
        }
        for (size_t i = count / LANES; i > 1; --i) {
            const size_t j = below(i);
            std::swap_ranges(all.begin() + (i - 1) * LANES, all.begin() + i * LANES, all.begin() + j * LANES);
        }
    }
    return all;
}

}  // namespace

void launch(const Launch& how, std::function<void()> body) {
    grid_size = how.grid;
    block_size = dim3{how.threads, 1, 1};
    kernel = std::move(body);
    shared_memory = how.shared;
    shared_bytes = how.shared_bytes;
    // Pages that no thread reaches are never made.
    void* stacks = mmap(nullptr, how.threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) fail("no memory for the threads' stacks");
    const long blocks = static_cast<long>(how.grid.x) * how.grid.y * how.grid.z;
    for (long b = 0; b < blocks; ++b) {
        const long index = how.order == Order::FORWARD ? b : blocks - 1 - b;
        const dim3 block{static_cast<unsigned>(index % how.grid.x), static_cast<unsigned>(index / how.grid.x % how.grid.y),
                         static_cast<unsigned>(index / how.grid.x / how.grid.y)};
        memset(shared_memory, 0xff, shared_bytes);
        warps.assign((how.threads + LANES - 1) / LANES, Warp());
        threads.assign(how.threads, Thread());
        arrived_at_barrier = 0;
        completed_barriers = 0;
        returned = 0;
        for (unsigned t = 0; t < how.threads; ++t) {
            Thread& thread = threads[t];
            thread.place = {dim3{t, 0, 0}, block};
            thread.warp = &warps[t / LANES];
            thread.lane = t % LANES;
            ++thread.warp->lanes;
            prepare(thread.context, static_cast<unsigned char*>(stacks) + t * STACK, begin_thread);
        }
        run_block(thread_order(how.order, how.threads, static_cast<unsigned>(index)));
    }
}

int lane() { return current->lane; }

void block_barrier() {
    if (returned > 0) wrong("__syncthreads after another thread has returned");
    ++current->barriers;
    if (++arrived_at_barrier == static_cast<int>(threads.size())) {
        arrived_at_barrier = 0;
        ++completed_barriers;
    } else {
        pause();
    }
}

const unsigned char* exchange(Together what, const void* mine, size_t bytes) {
    Thread& t = *current;
    Warp& w = *t.warp;
    if (w.arrived == 0) w.what = what;
    if (w.what != what) wrong("the lanes of a warp do different things");
    unsigned char* buffer = w.buffers[t.operations & 1];
    if (bytes > 0) memcpy(buffer + t.lane * EXCHANGE_STRIDE, mine, bytes);
    ++t.operations;
    if (++w.arrived == LANES) {
        w.arrived = 0;
        ++w.completed;
    } else {
        pause();
    }
    return buffer;
}

// ------------------------------------------------------------------------------------------------- asynchronous copies

namespace {

bool in_shared(const void* p, size_t bytes) {
    const auto at = static_cast<const unsigned char*>(p);
    return at >= shared_memory && at + bytes <= shared_memory + shared_bytes;
}

}  // namespace

// The copy happens when it is waited for; until then its destination holds NaN.
void copy_start(void* shared, const void* global, int bytes) {
    if (!in_shared(shared, 16)) wrong("cp.async to an address outside the block's shared memory");
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) wrong("cp.async of an address that is not aligned");
    memset(shared, 0xff, 16);
    current->copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, current->group});
}

void copy_commit() { ++current->group; }

void copy_wait(int pending) {
    auto& copies = current->copies;
    const int last = current->group - pending;
    size_t kept = 0;
    for (const Copy& copy : copies) {
        if (copy.group < last) {
            memset(copy.to, 0, 16);
            memcpy(copy.to, copy.from, copy.bytes);
        } else {
            copies[kept++] = copy;
        }
    }
    copies.resize(kept);
}

// --------------------------------------------------------------------------------------------------- matrix instructions

void load_matrices(uint32_t (&r)[4], const void* shared, bool transposed) {
    if (!in_shared(shared, 16)) wrong("ldmatrix of an address outside the block's shared memory");
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) wrong("ldmatrix of an address that is not aligned");
    const unsigned char* all = exchange(Together::MATRICES, &shared, sizeof(shared));
    const int g = lane() / 4, t = lane() % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const auto value = [&](int row, int column) {
            const unsigned char* address;
            memcpy(&address, all + (matrix * 8 + row) * EXCHANGE_STRIDE, sizeof(address));
            uint16_t bits;
            memcpy(&bits, address + 2 * column, sizeof(bits));
            return static_cast<uint32_t>(bits);
        };
        r[matrix] = transposed ? value(2 * t, g) | value(2 * t + 1, g) << 16 : value(g, 2 * t) | value(g, 2 * t + 1) << 16;
    }
}

void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*decode)(uint16_t)) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    Warp& w = *current->warp;
    const long operation = current->operations;
    // The lane that completes the warp multiplies for all.
    const bool last = w.arrived == LANES - 1;
    if (last && w.what == Together::PRODUCT) {
        unsigned char* buffer = w.buffers[operation & 1];
        memcpy(buffer + current->lane * EXCHANGE_STRIDE, mine, sizeof(mine));
        float left[16][16], right[16][8], sum[16][8] = {};
        for (int lane = 0; lane < LANES; ++lane) {
            uint16_t v[12];
            memcpy(v, buffer + lane * EXCHANGE_STRIDE, sizeof(v));
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 2; ++i) {
                left[g][2 * t + i] = decode(v[i]);
                left[g + 8][2 * t + i] = decode(v[2 + i]);
                left[g][2 * t + 8 + i] = decode(v[4 + i]);
                left[g + 8][2 * t + 8 + i] = decode(v[6 + i]);
                right[2 * t + i][g] = decode(v[8 + i]);
                right[2 * t + 8 + i][g] = decode(v[10 + i]);
            }
        }
        for (int k = 0; k < 16; ++k) {
            for (int i = 0; i < 16; ++i) {
                for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
            }
        }
        memcpy(w.result[operation & 1], sum, sizeof(sum));
    }
    exchange(Together::PRODUCT, mine, sizeof(mine));
    const auto& result = w.result[operation & 1];
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) d[i] += result[g + i / 2 * 8][2 * t + i % 2];
}

// ---------------------------------------------------------------------------------------------------------- half precision

float half_to_float(uint16_t bits) {
    static const std::vector<float> table = [] {
        std::vector<float> values(1 << 16);
        for (uint32_t b = 0; b < values.size(); ++b) {
            const int exponent = b >> 10 & 31, mantissa = b & 1023;
            float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent > 0 ? ldexpf(1024 + mantissa, exponent - 25)
                                     : ldexpf(mantissa, -24);
            values[b] = b >> 15 ? -x : x;
        }
        return values;
    }();
    return table[bits];
}

uint16_t float_to_half(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint16_t sign = bits >> 16 & 0x8000;
    const float magnitude = fabsf(x);
    if (x != x) return 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(rintf(magnitude * 0x1p24f));
    // Thirteen bits go: round to nearest even, carrying into the exponent.
    const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

}  // namespace emulation
