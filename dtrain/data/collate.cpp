// Collates sequences of stores into a micro-batch, in one pass. Built and called by collate.py.
//
// Files are not trusted: offsets of a store are checked against the sizes of its arrays.

#include <algorithm>
#include <cstdint>

namespace {

struct Segment {
    int64_t document;
    int32_t start, tokens;
};

struct Shard {
    const int32_t *tokens;  // null until it is opened
    const int64_t *token_offsets;
    const int32_t *runs;
    const int64_t *run_offsets;
    const int32_t *labels;
    int64_t sizes[3];  // of tokens, runs, and documents

    bool holds(int64_t document, int64_t start, int64_t count) const {
        if (document < 0 || document >= sizes[2] || start < 0 || count < 1) return false;
        const int64_t begin = token_offsets[document], end = token_offsets[document + 1];
        const int64_t first = run_offsets[document], last = run_offsets[document + 1];
        return 0 <= begin && begin + start + count <= end && end <= sizes[0] && 0 <= first &&
               first <= last && last <= sizes[1] && (last - first) % 2 == 0;
    }
};

struct Source {
    int64_t first_sequence;  // among the sequences of all sources
    int64_t first_document;  // among the documents of all sources
    const int64_t *sequence_offsets;
    const Segment *segments;
    int64_t segment_count;
    const int64_t (*table)[2];  // first document and bytes of each shard
    Shard *shards;
    int64_t shard_count;

    int64_t shard_of(int64_t document) const {
        int64_t low = 0, high = shard_count;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (table[middle][0] <= document ? low : high) = middle;
        }
        return low;
    }
};

// Where results go: seven arrays of `room` numbers.
struct Out {
    int64_t *ids, *positions, *target_positions, *targets, *lengths, *documents, *labels, room;

    Out(int64_t *block, int64_t room)
        : ids(block), positions(ids + room), target_positions(positions + room),
          targets(target_positions + room), lengths(targets + room), documents(lengths + room),
          labels(documents + room), room(room) {}
};

// Progress: how much is written, and which sequence and segment come next.
struct State {
    int64_t tokens, targets, documents, sequence, segment;
    int64_t source, shard;      // one that must be opened
    int64_t sequence_tokens[];  // of each sequence
};

// Appends a segment; false if the store is damaged.
bool append(const Shard &shard, const Segment &segment, int64_t document, const Out &out,
            State &at) {
    const int64_t n = segment.tokens, base = at.tokens;
    if (!shard.holds(document, segment.start, n) || base + n > out.room) return false;
    const int32_t *tokens = shard.tokens + shard.token_offsets[document] + segment.start;
    int64_t *__restrict ids = out.ids + base, *__restrict positions = out.positions + base;
    for (int64_t i = 0; i < n; i++) {
        ids[i] = tokens[i];
        positions[i] = i;
    }
    const int64_t last = shard.run_offsets[document + 1];
    for (int64_t run = shard.run_offsets[document]; run < last; run += 2) {
        const int64_t start = std::max<int64_t>(shard.runs[run] - segment.start, 1);
        const int64_t stop = std::min<int64_t>(shard.runs[run + 1] - segment.start, n);
        const int64_t count = std::max<int64_t>(stop - start, 0);
        if (at.targets + count > out.room) return false;
        int64_t *__restrict target_positions = out.target_positions + at.targets;
        int64_t *__restrict targets = out.targets + at.targets;
        for (int64_t i = 0; i < count; i++) {
            target_positions[i] = base + start - 1 + i;
            targets[i] = tokens[start + i];
        }
        at.targets += count;
    }
    at.tokens += n;
    out.labels[at.documents] = shard.labels[document];
    out.lengths[at.documents++] = n;
    return true;
}

}  // namespace

enum { DONE, CLOSED, DAMAGED };

// Collates `sequences` of all `sources` into `block`. CLOSED: open the shard that `at` names and
// call again.
extern "C" int64_t gather(const Source *sources, int64_t source_count, const int64_t *sequences,
                          int64_t sequence_count, int64_t *block, int64_t room, State *at) {
    const Out out(block, room);
    for (; at->sequence < sequence_count; at->sequence++, at->segment = 0) {
        int64_t number = source_count - 1;
        while (number > 0 && sources[number].first_sequence > sequences[at->sequence]) number--;
        const Source &source = sources[number];
        const int64_t sequence = sequences[at->sequence] - source.first_sequence;
        const int64_t first = source.sequence_offsets[sequence];
        const int64_t last = source.sequence_offsets[sequence + 1];
        if (first < 0 || last > source.segment_count) return DAMAGED;
        for (; first + at->segment < last; at->segment++) {
            const Segment &segment = source.segments[first + at->segment];
            at->source = number;
            at->shard = source.shard_of(segment.document);
            const Shard &shard = source.shards[at->shard];
            if (!shard.tokens) return CLOSED;
            if (!append(shard, segment, segment.document - source.table[at->shard][0], out, *at))
                return DAMAGED;
            out.documents[at->documents - 1] = source.first_document + segment.document;
            at->sequence_tokens[at->sequence] += segment.tokens;
        }
    }
    return DONE;
}
