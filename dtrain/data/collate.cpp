// Rows of stores into the tensors of a micro-batch, in one pass. Built and called by gather.py.
//
// Nothing here trusts a file: what a store says is checked against the sizes of its arrays.

#include <algorithm>
#include <cstdint>

namespace {

struct Piece {
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
    int64_t first_row;       // among the rows of all sources
    int64_t first_document;  // among the documents of all sources
    const int64_t *row_offsets;
    const Piece *pieces;
    int64_t piece_count;
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
    int64_t *ids, *positions, *predict, *targets, *lengths, *documents, *labels, room;

    Out(int64_t *block, int64_t room)
        : ids(block), positions(ids + room), predict(positions + room), targets(predict + room),
          lengths(targets + room), documents(lengths + room), labels(documents + room),
          room(room) {}
};

// How far the work is, and where it stopped: what is written, which row and piece come next.
struct State {
    int64_t tokens, targets, documents, row, piece;
    int64_t source, shard;  // one that must be opened
    int64_t row_tokens[];   // of each row
};

// Appends a piece. False where the store is damaged.
bool append(const Shard &shard, const Piece &piece, int64_t document, const Out &out, State &at) {
    const int64_t n = piece.tokens, base = at.tokens;
    if (!shard.holds(document, piece.start, n) || base + n > out.room) return false;
    const int32_t *tokens = shard.tokens + shard.token_offsets[document] + piece.start;
    int64_t *__restrict ids = out.ids + base, *__restrict positions = out.positions + base;
    for (int64_t i = 0; i < n; i++) {
        ids[i] = tokens[i];
        positions[i] = i;
    }
    const int64_t last = shard.run_offsets[document + 1];
    for (int64_t run = shard.run_offsets[document]; run < last; run += 2) {
        const int64_t start = std::max<int64_t>(shard.runs[run] - piece.start, 1);
        const int64_t stop = std::min<int64_t>(shard.runs[run + 1] - piece.start, n);
        const int64_t count = std::max<int64_t>(stop - start, 0);
        if (at.targets + count > out.room) return false;
        int64_t *__restrict predict = out.predict + at.targets;
        int64_t *__restrict targets = out.targets + at.targets;
        for (int64_t i = 0; i < count; i++) {
            predict[i] = base + start - 1 + i;
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

// `rows` of all `sources` into `block`; CLOSED asks for a shard, and to be called again with it.
extern "C" int64_t gather(const Source *sources, int64_t source_count, const int64_t *rows,
                          int64_t row_count, int64_t *block, int64_t room, State *at) {
    const Out out(block, room);
    for (; at->row < row_count; at->row++, at->piece = 0) {
        int64_t number = source_count - 1;
        while (number > 0 && sources[number].first_row > rows[at->row]) number--;
        const Source &source = sources[number];
        const int64_t row = rows[at->row] - source.first_row;
        const int64_t first = source.row_offsets[row], last = source.row_offsets[row + 1];
        if (first < 0 || last > source.piece_count) return DAMAGED;
        for (; first + at->piece < last; at->piece++) {
            const Piece &piece = source.pieces[first + at->piece];
            at->source = number;
            at->shard = source.shard_of(piece.document);
            const Shard &shard = source.shards[at->shard];
            if (!shard.tokens) return CLOSED;
            if (!append(shard, piece, piece.document - source.table[at->shard][0], out, *at))
                return DAMAGED;
            out.documents[at->documents - 1] = source.first_document + piece.document;
            at->row_tokens[at->row] += piece.tokens;
        }
    }
    return DONE;
}
