#include "../attention.cu"

#include "launch.h"

int main() {
    return emulation::run({
        ENTRIES(attention_64)
        ENTRIES(attention_128)
        ENTRIES(attention_512)
    });
}
