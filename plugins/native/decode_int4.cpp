// Few queries over a cache of int4: see integers.h.
#include "integers.h"

// As `decode`, with the cache's bytes as key and value.
extern "C" int decode_int4(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    using namespace attnbench;
    return run_decode<Integers<4>>(*problem, *scales);
}
