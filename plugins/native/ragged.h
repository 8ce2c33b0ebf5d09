// A batch of entries that are each as long as they are, in one call: an array of problems of one entry, which are alike but
// for where things lie, lengths, strips and ranges.
//
// Threads take tasks from one list: for each key/value head, those with the most work first, parts of its packing and then
// the strips of its query heads. A strip waits until its head is packed, and a head for the room of one that is done with;
// who waits does so for what others took before, so no thread waits for long, and none is left without work before the
// last strips. Each row is computed by one thread in one order, whichever that is.
#pragma once

#include <atomic>
#include <thread>

#include "attention.h"

namespace attnbench {

struct RaggedHead {
    const Problem* problem;
    int64_t head, work, packings, strips;
};

// What becomes of a head's room, in the order of heads that get it: a count of tasks done of all of them.
struct Done {
    void wait(int64_t count) const {
        while (tasks.load(std::memory_order_acquire) < count) std::this_thread::yield();
    }
    std::atomic<int64_t> tasks{0};
};

inline std::vector<RaggedHead> ragged_heads(const Problem* problems, int64_t count) {
    std::vector<RaggedHead> heads;
    for (const Problem* p = problems; p < problems + count; ++p) {
        int64_t work = 0;
        for (int64_t s = 0; s < p->strip_count; ++s)
            for (int64_t r = p->strips[s].first_range; r < p->strips[s].end_range; ++r)
                work += (p->strips[s].end - p->strips[s].start) * int64_t(p->ranges[r].end - p->ranges[r].start);
        const int64_t blocks = p->packed_keys() / KEYS, group = p->heads / p->kv_heads;
        for (int64_t h = 0; h < p->kv_heads; ++h)
            heads.push_back({p, h, work * group, std::min(blocks, p->threads), group * p->strip_count});
    }
    std::stable_sort(heads.begin(), heads.end(), [](const auto& a, const auto& b) { return a.work > b.work; });
    return heads;
}

template <class Keys, class Values>
void ragged(const Problem* problems, int64_t count) {
    Problem largest = problems[0];  // what rooms are made for
    for (int64_t i = 1; i < count; ++i) {
        largest.kv_seq = std::max(largest.kv_seq, problems[i].kv_seq);
        largest.strip_rows = std::max(largest.strip_rows, problems[i].strip_rows);
    }
    const auto heads = ragged_heads(problems, count);
    const int64_t threads = largest.threads, rooms = std::min<int64_t>(threads, heads.size());
    std::vector<int64_t> first(heads.size() + 1), before(heads.size());  // tasks: of all heads, and of a room's
    for (size_t n = 0; n < heads.size(); ++n) {
        const auto tasks = [&](size_t i) { return heads[i].packings + heads[i].strips; };
        first[n + 1] = first[n] + tasks(n);
        if (n >= size_t(rooms)) before[n] = before[n - rooms] + tasks(n - rooms);
    }
    std::vector<std::unique_ptr<Workspace<Keys, Values>>> works;
    std::vector<std::unique_ptr<Packed<Keys, Values>>> packs;  // made here: no exception may leave a parallel region
    for (int64_t t = 0; t < threads; ++t) works.push_back(std::make_unique<Workspace<Keys, Values>>(largest));
    for (int64_t t = 0; t < rooms; ++t) packs.push_back(std::make_unique<Packed<Keys, Values>>(largest));
    std::vector<Done> done(rooms);
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        auto& work = *works[omp_get_thread_num()];
        size_t n = 0;
        for (int64_t task; (task = next.fetch_add(1)) < first.back();) {
            while (task >= first[n + 1]) ++n;
            const RaggedHead& h = heads[n];
            const Problem& p = *h.problem;
            auto& own = *packs[n % rooms];
            auto& room = done[n % rooms];
            const int64_t part = task - first[n], strip = part - h.packings, group = p.heads / p.kv_heads;
            if (strip < 0) {
                room.wait(before[n]);
                for (int64_t block = part; block < p.packed_keys() / KEYS; block += h.packings) own.pack(p, 0, h.head, block);
            } else {
                room.wait(before[n] + h.packings);
                // A causal head's last strips are the longest: they go first.
                attend(p, own, work, 0, h.head * group + strip % group, p.strips[p.strip_count - 1 - strip / group]);
            }
            room.tasks.fetch_add(1, std::memory_order_release);
        }
    }
}

// Runs it for C: 0, or 1 where memory did not suffice. For keys that are not measured first.
template <class Keys, class Values>
int run_ragged(const Problem* problems, int64_t count) {
    try {
        ragged<Keys, Values>(problems, count);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

}  // namespace attnbench
