// Few queries over a cache of int4: see integers.h.
#include "append.h"
#include "integers.h"

// As `decode`, with the cache's bytes as key and value.
extern "C" int decode_int4(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    using namespace attnbench;
    return run_decode<Integers<4>>(*problem, *scales);
}

extern "C" int append_int4(const attnbench::Tokens* tokens) {
    using namespace attnbench;
    append<WholeForm<4>>(*tokens);
    return 0;
}
