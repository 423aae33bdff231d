// One launch, read from standard input and answered on standard output; the program of a `.cu` file is that file, its list of
// entry points and this.
//
// The request is lines of words, then the buffers' bytes one after the other; the answer is the buffers' bytes afterwards.
//     kernel NAME
//     grid X Y Z
//     block THREADS
//     shared BYTES
//     order forward|reverse|shuffled
//     buffer BYTES                      once per buffer, in order
//     arg pointer BUFFER OFFSET | null | int V | long V | float BITS | ints V...      once per parameter
//     data
// A kind of argument that is not the parameter's is refused, so the entry points are checked as well.
#pragma once

#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "emulate.h"

namespace emulation {

enum class Order { FORWARD, REVERSE, SHUFFLED };

struct Launch {
    dim3 grid;
    unsigned threads = 0;
    Order order = Order::FORWARD;
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Runs `body` as every thread of the grid.
void launch(const Launch& how, std::function<void()> body);

// The arguments that are not yet taken.
class Arguments {
   public:
    std::vector<std::vector<std::string>> words;
    std::vector<unsigned char*> buffers;

    template <typename T>
    T take() {
        if (next == words.size()) fail("the kernel takes more than %zu arguments", words.size());
        const auto& arg = words[next++];
        if constexpr (std::is_pointer_v<T>) {
            if (arg[0] == "null") return nullptr;
            expect(arg, "pointer");
            return reinterpret_cast<T>(buffers.at(std::stoul(arg.at(1))) + std::stoul(arg.at(2)));
        } else if constexpr (std::is_same_v<T, int>) {
            expect(arg, "int");
            return std::stoi(arg.at(1));
        } else if constexpr (std::is_same_v<T, long long>) {
            expect(arg, "long");
            return std::stoll(arg.at(1));
        } else if constexpr (std::is_same_v<T, float>) {
            expect(arg, "float");
            return bit_cast<float>(static_cast<uint32_t>(std::stoul(arg.at(1))));
        } else {
            expect(arg, "ints");
            int values[sizeof(T) / sizeof(int)];
            if (arg.size() - 1 != sizeof(T) / sizeof(int)) fail("argument %zu: %zu ints, not %zu", next, arg.size() - 1, sizeof(T) / sizeof(int));
            for (size_t i = 1; i < arg.size(); ++i) values[i - 1] = std::stoi(arg[i]);
            T value;
            memcpy(&value, values, sizeof(value));
            return value;
        }
    }
    void finish() const {
        if (next != words.size()) fail("the kernel takes %zu arguments, not %zu", next, words.size());
    }

   private:
    size_t next = 0;
    void expect(const std::vector<std::string>& arg, const char* kind) const {
        if (arg[0] != kind) fail("argument %zu is %s, the parameter is %s", next, arg[0].c_str(), kind);
    }
};

// A kernel as a function of a launch and its arguments.
using Entry = std::function<void(const Launch&, Arguments&)>;

template <typename... Parameters>
Entry entry(void (*kernel)(Parameters...)) {
    return [kernel](const Launch& how, Arguments& arguments) {
        // Braces keep the order of evaluation.
        std::tuple<Parameters...> values{arguments.take<Parameters>()...};
        arguments.finish();
        launch(how, [&] { std::apply(kernel, values); });
    };
}

int run(const std::map<std::string, Entry>& entries);

}  // namespace emulation

#define ENTRY(name) {#name, emulation::entry(name)},
#define ENTRIES_16_BIT(name) ENTRY(name##_bf16) ENTRY(name##_f16)
#define ENTRIES(name) ENTRIES_16_BIT(name) ENTRY(name##_f32)
