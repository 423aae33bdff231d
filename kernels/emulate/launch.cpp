// Reads a launch, lays its buffers between guard pages, runs it and writes the buffers back; see launch.h.
#include "launch.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <iostream>

namespace emulation {

namespace {

std::string kernel_name = "no kernel";

// `bytes` whose end lies on a page that may not be touched, the start on a multiple of 16 as the end allows.
unsigned char* guarded(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    const size_t pages = (bytes + page - 1) / page * page;
    auto base = static_cast<unsigned char*>(mmap(nullptr, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base + page, pages, PROT_READ | PROT_WRITE) != 0) fail("no memory for %zu bytes", bytes);
    return base + page + (pages - bytes) / 16 * 16;
}

// Of the up to 15 bytes between a buffer's end and its guard page.
constexpr unsigned char TAIL = 0xa5;

struct Buffer {
    unsigned char* data;
    size_t bytes;

    explicit Buffer(size_t bytes) : data(guarded(bytes)), bytes(bytes) { memset(data + bytes, TAIL, padding()); }
    size_t padding() const { return (16 - bytes % 16) % 16; }
    void check(size_t index) const {
        for (size_t i = 0; i < padding(); ++i) {
            if (data[bytes + i] != TAIL) fail("something was written past the end of buffer %zu", index);
        }
    }
};

void on_signal(int signal) {
    const char* what = signal == SIGSEGV || signal == SIGBUS ? "an address outside every buffer" : "an address that is not aligned, or an overflow";
    char text[200];
    const int length = snprintf(text, sizeof(text), "%s: block (%u, %u, %u), thread %u: %s\n", kernel_name.c_str(), place.block.x, place.block.y,
                                place.block.z, place.thread.x, what);
    if (write(2, text, length) < 0) _exit(3);
    _exit(2);
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", kernel_name.c_str());
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    fflush(stderr);
    _exit(1);
}

int run(const std::map<std::string, Entry>& entries) {
    // On a stack of its own: a fiber's may be what went wrong.
    static unsigned char signal_stack[64 << 10];
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof(signal_stack);
    sigaltstack(&stack, nullptr);
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_ONSTACK;
    for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP}) sigaction(signal, &action, nullptr);

    std::ios::sync_with_stdio(false);
    Launch how;
    Arguments arguments;
    std::vector<Buffer> buffers;
    for (std::string line; std::getline(std::cin, line) && line != "data";) {
        std::istringstream in(line);
        std::string word;
        in >> word;
        if (word == "kernel") {
            in >> kernel_name;
        } else if (word == "grid") {
            in >> how.grid.x >> how.grid.y >> how.grid.z;
        } else if (word == "block") {
            in >> how.threads;
        } else if (word == "shared") {
            in >> how.shared_bytes;
        } else if (word == "order") {
            in >> word;
            how.order = word == "forward" ? Order::FORWARD : word == "reverse" ? Order::REVERSE : Order::SHUFFLED;
        } else if (word == "buffer") {
            size_t bytes = 0;
            in >> bytes;
            buffers.emplace_back(bytes);
            arguments.buffers.push_back(buffers.back().data);
        } else if (word == "arg") {
            std::vector<std::string> words;
            while (in >> word) words.push_back(word);
            arguments.words.push_back(words);
        } else {
            fail("unknown line: %s", line.c_str());
        }
    }
    for (const Buffer& buffer : buffers) {
        if (!std::cin.read(reinterpret_cast<char*>(buffer.data), buffer.bytes)) fail("the buffers' bytes are missing");
    }
    const auto found = entries.find(kernel_name);
    if (found == entries.end()) fail("no such kernel here");
    how.shared = guarded(how.shared_bytes);
    found->second(how, arguments);
    for (size_t i = 0; i < buffers.size(); ++i) buffers[i].check(i);
    for (const Buffer& buffer : buffers) std::cout.write(reinterpret_cast<const char*>(buffer.data), buffer.bytes);
    std::cout.flush();
    return 0;
}

}  // namespace emulation
