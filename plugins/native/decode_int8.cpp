// Few queries over a cache of int8: see integers.h.
#include "append.h"
#include "integers.h"

// As `decode`, with the cache's bytes as key and value.
extern "C" int decode_int8(const attnbench::Problem* problem, const attnbench::Scales* scales) {
    using namespace attnbench;
    return run_decode<Integers<8>>(*problem, *scales);
}

extern "C" int append_int8(const attnbench::Tokens* tokens) {
    using namespace attnbench;
    append<WholeForm<8>>(*tokens);
    return 0;
}
