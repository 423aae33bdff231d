#include "../sampler.cu"

#include "launch.h"

int main() {
    return emulation::run({ENTRY(combine_latents)});
}
