// Loops over float32 on a CPU that torch would make in several passes through memory, in one each.
// Built and called by native.py. Rows are shared out among threads; no sum depends on how many.
//
// Letters: T tokens, h their width, H query heads, K key/value heads, D head size, V vocabulary.

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

// Of the BLAS that libtorch_cpu brings along: column-major, as all of Fortran.
extern "C" void sgemm_(const char *, const char *, const int *, const int *, const int *,
                       const float *, const float *, const int *, const float *, const int *,
                       const float *, float *, const int *);

// A function that rounds a product before it is added, where others may fuse the two.
#if defined(__clang__)
#define SEPARATE
#define SEPARATELY _Pragma("clang fp contract(off)")
#else
#define SEPARATE __attribute__((optimize("fp-contract=off")))
#define SEPARATELY
#endif

namespace {

// Cephes' expf: within 2 units of the last place; NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float z = std::nearbyint(x * 1.44269504088896341f);
    const float r = x - z * 0.693359375f - z * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * r * r + r + 1.0f;
    return y * std::bit_cast<float>((static_cast<int32_t>(z) + 127) << 23);
}

// C [m, n] = alpha A B + beta C, row-major; `at`, `bt`: A or B is stored transposed.
void product(bool at, bool bt, int m, int n, int k, float alpha, const float *a, int lda,
             const float *b, int ldb, float beta, float *c, int ldc) {
    sgemm_(bt ? "T" : "N", at ? "T" : "N", &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}

float greatest(const float *x, int64_t n) {
    float found = x[0];
#pragma omp simd reduction(max : found)
    for (int64_t i = 0; i < n; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// x becomes exp(x - shift); returns the sum.
float exponentials(float *x, int64_t n, float shift) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        x[i] = exponential(x[i] - shift);
        total += x[i];
    }
    return total;
}

void scale(float *x, int64_t n, float factor) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

// A tensor [T, heads, D] whose last dimension is dense.
struct View {
    float *data;
    int64_t token, head;  // strides
    float *at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Sizes {
    int64_t heads, shared, size, wide;  // H, K, D and the head size of values
    float factor;                       // of the scores
};

// Scores of a block of queries and a tile of keys stay in a core's cache. BLOCK divides TILE.
constexpr int64_t BLOCK = 64, TILE = 256;

// Queries [start, start + rows) of a document against its keys [from, to).
struct Tile {
    int64_t start, rows, from, to;
    int64_t width() const { return to - from; }
    int64_t seen(int64_t row) const {  // how many of the keys it may see
        const int64_t own = start + row + 1 - from;
        return own < width() ? own : width();
    }
};

template <typename Work> void each_tile(int64_t tokens, int64_t start, Work work) {
    const int64_t stop = start + BLOCK < tokens ? start + BLOCK : tokens;
    for (int64_t from = 0; from < stop; from += TILE)
        work(Tile{start, stop - start, from, from + TILE < stop ? from + TILE : stop});
}

struct Document {
    int64_t first, tokens;  // of its row
};

// exp(row - shift) of the keys it sees, 0 for those ahead; returns the sum.
float weights_of(float *row, const Tile &tile, int64_t r, float shift) {
    const int64_t seen = tile.seen(r);
    std::memset(row + seen, 0, (tile.width() - seen) * sizeof(float));
    return exponentials(row, seen, shift);
}

// Softmax as its tiles come (arXiv:1805.02867): what was summed before is rescaled.
void attend(const View &q, const View &k, const View &v, const View &out, float *logsums,
            const Document &doc, int64_t head, const Sizes &s) {
    thread_local std::vector<float> room(BLOCK * TILE);
    const int64_t shared = head / (s.heads / s.shared);
    for (int64_t start = 0; start < doc.tokens; start += BLOCK) {
        float top[BLOCK], total[BLOCK], *scores = room.data();
        each_tile(doc.tokens, start, [&](const Tile &t) {
            const int64_t n = t.width(), keys = doc.first + t.from;
            float *sums = out.at(doc.first + start, head);
            product(false, true, t.rows, n, s.size, s.factor, q.at(doc.first + start, head),
                    q.token, k.at(keys, shared), k.token, 0.0f, scores, n);
            for (int64_t r = 0; r < t.rows; r++) {
                float *row = scores + r * n;
                float shift = greatest(row, t.seen(r));
                if (t.from > 0) {
                    shift = top[r] > shift ? top[r] : shift;
                    const float less = exponential(top[r] - shift);
                    scale(sums + r * out.token, s.wide, less);
                    total[r] = total[r] * less + weights_of(row, t, r, shift);
                } else {
                    total[r] = weights_of(row, t, r, shift);
                }
                top[r] = shift;
            }
            product(false, false, t.rows, s.wide, n, 1.0f, scores, n, v.at(keys, shared), v.token,
                    t.from > 0 ? 1.0f : 0.0f, sums, out.token);
        });
        const int64_t left = doc.tokens - start;
        for (int64_t r = 0; r < (left < BLOCK ? left : BLOCK); r++) {
            const int64_t token = doc.first + start + r;
            scale(out.at(token, head), s.wide, 1.0f / total[r]);
            logsums[token] = top[r] + std::log(total[r]);
        }
    }
}

float dot(const float *a, const float *b, int64_t n) {
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += a[i] * b[i];
    return total;
}

struct Gradients {
    View out, q, k, v;
};

// One query head of one document; dk and dv are added to.
void attend_backward(const View &q, const View &k, const View &v, const View &out,
                     const float *logsums, const Gradients &d, const Document &doc, int64_t head,
                     const Sizes &s) {
    thread_local std::vector<float> room(2 * BLOCK * TILE);
    const int64_t shared = head / (s.heads / s.shared);
    float *p = room.data(), *dp = p + BLOCK * TILE;
    for (int64_t start = 0; start < doc.tokens; start += BLOCK)
        each_tile(doc.tokens, start, [&](const Tile &t) {
            const int64_t n = t.width(), keys = doc.first + t.from, first = doc.first + start;
            const float *queries = q.at(first, head), *douts = d.out.at(first, head);
            const float *tile_k = k.at(keys, shared), *tile_v = v.at(keys, shared);
            product(false, true, t.rows, n, s.size, s.factor, queries, q.token, tile_k, k.token,
                    0.0f, p, n);
            product(false, true, t.rows, n, s.wide, 1.0f, douts, d.out.token, tile_v, v.token,
                    0.0f, dp, n);
            for (int64_t r = 0; r < t.rows; r++) {
                float *row = p + r * n, *drow = dp + r * n;
                weights_of(row, t, r, logsums[first + r]);
                const float mean = dot(d.out.at(first + r, head), out.at(first + r, head), s.wide);
#pragma omp simd
                for (int64_t i = 0; i < n; i++) drow[i] = row[i] * (drow[i] - mean);
            }
            product(true, false, n, s.wide, t.rows, 1.0f, p, n, douts, d.out.token, 1.0f,
                    d.v.at(keys, shared), d.v.token);
            product(false, false, t.rows, s.size, n, s.factor, dp, n, tile_k, k.token,
                    t.from > 0 ? 1.0f : 0.0f, d.q.at(first, head), d.q.token);
            product(true, false, n, s.size, t.rows, s.factor, dp, n, queries, q.token, 1.0f,
                    d.k.at(keys, shared), d.k.token);
        });
}

std::vector<int64_t> starts_of(const int64_t *lengths, int64_t documents) {
    std::vector<int64_t> starts(documents, 0);
    for (int64_t i = 1; i < documents; i++) starts[i] = starts[i - 1] + lengths[i - 1];
    return starts;
}

// MT19937 (Matsumoto and Nishimura, 1998), seeded and read as torch's generator for CPUs does.
struct Twister {
    static constexpr int N = 624, M = 397;
    uint32_t state[N], numbers[N];

    explicit Twister(uint32_t seed) {
        state[0] = seed;
        for (int i = 1; i < N; i++)
            state[i] = 1812433253u * (state[i - 1] ^ (state[i - 1] >> 30)) + i;
    }

    static uint32_t twisted(uint32_t far, uint32_t own, uint32_t next) {
        const uint32_t y = (own & 0x80000000u) | (next & 0x7fffffffu);
        return far ^ (y >> 1) ^ ((next & 1u) * 0x9908b0dfu);
    }

    void next() {
#pragma omp simd
        for (int i = 0; i < N - M; i++)
            state[i] = twisted(state[i + M], state[i], state[i + 1]);
#pragma omp simd safelen(128)
        for (int i = N - M; i < N - 1; i++)
            state[i] = twisted(state[i + M - N], state[i], state[i + 1]);
        state[N - 1] = twisted(state[M - 1], state[N - 1], state[0]);
#pragma omp simd
        for (int i = 0; i < N; i++) {
            uint32_t y = state[i];
            y ^= y >> 11;
            y ^= (y << 7) & 0x9d2c5680u;
            y ^= (y << 15) & 0xefc60000u;
            numbers[i ^ 1] = y ^ (y >> 18);  // the first of two is the upper half of 64 bits
        }
    }
};

}  // namespace

extern "C" {

// Which of n elements stay: those whose 16 bits of `random_` are at least `least`.
void keep(bool *kept, int64_t n, int64_t seed, int64_t least) {
    Twister twister(static_cast<uint32_t>(seed));
    const int16_t bound = static_cast<int16_t>(least);
    for (int64_t done = 0; done < n; done += 2 * Twister::N) {
        int16_t lanes[2 * Twister::N];
        twister.next();
        std::memcpy(lanes, twister.numbers, sizeof(lanes));
        const int64_t left = n - done, here = left < 2 * Twister::N ? left : 2 * Twister::N;
#pragma omp simd
        for (int64_t i = 0; i < here; i++) kept[done + i] = lanes[i] >= bound;
    }
}

// What dropout leaves of x.
void drop(const float *x, const bool *kept, float *out, int64_t n, float factor) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * static_cast<float>(kept[i]);
}

void add_dropped(const float *x, const bool *kept, float *out, int64_t n, float factor) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) out[i] += x[i] * factor * static_cast<float>(kept[i]);
}

// silu(gate) up
void swiglu(const float *gate, const float *up, float *out, int64_t n) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

void swiglu_backward(const float *gradient, const float *gate, const float *up, float *dgate,
                     float *dup, int64_t n) {
#pragma omp parallel for simd
    for (int64_t i = 0; i < n; i++) {
        const float s = 1.0f / (1.0f + exponential(-gate[i]));
        dup[i] = gradient[i] * gate[i] * s;
        dgate[i] = gradient[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
    }
}

// y [T, h] = x weight / rms(x), and 1 / rms(x) [T]
void rms_norm(const float *x, const float *weight, float *y, float *rstd, int64_t tokens,
              int64_t h, float epsilon) {
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++) {
        const float *in = x + t * h;
        float *out = y + t * h, total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < h; i++) total += in[i] * in[i];
        const float r = 1.0f / std::sqrt(total / h + epsilon);
        rstd[t] = r;
#pragma omp simd
        for (int64_t i = 0; i < h; i++) out[i] = in[i] * r * weight[i];
    }
}

// dx = r (w dy) - x r^3 mean(x w dy)
void rms_norm_backward(const float *gradient, const float *x, const float *weight,
                       const float *rstd, float *dx, int64_t tokens, int64_t h) {
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++) {
        const float *g = gradient + t * h, *in = x + t * h, r = rstd[t];
        float *out = dx + t * h, total = 0.0f;
#pragma omp simd reduction(+ : total)
        for (int64_t i = 0; i < h; i++) total += g[i] * weight[i] * in[i];
        const float factor = total / h * r * r * r;
#pragma omp simd
        for (int64_t i = 0; i < h; i++) out[i] = g[i] * weight[i] * r - in[i] * factor;
    }
}

// Halves (a, b) of each head as (a cos - sign b sin, b cos + sign a sin); cos, sin [T, D].
void rotary(const float *x, int64_t token, int64_t head, const float *cosine, const float *sine,
            float *out, int64_t out_token, int64_t out_head, int64_t tokens, int64_t heads,
            int64_t size, float sign) {
    const int64_t half = size / 2;
#pragma omp parallel for
    for (int64_t t = 0; t < tokens; t++) {
        const float *c = cosine + t * size, *s = sine + t * size;
        const float *sa = sign < 0 ? s + half : s, *sb = sign < 0 ? s : s + half;
        for (int64_t h = 0; h < heads; h++) {
            const float *a = x + t * token + h * head, *b = a + half;
            float *y = out + t * out_token + h * out_head;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                y[i] = a[i] * c[i] - sign * b[i] * sa[i];
                y[half + i] = b[i] * c[half + i] + sign * a[i] * sb[i];
            }
        }
    }
}

// x becomes what its own loss learns, softmax(x) less one at the target.
void cross_entropy(float *x, const int64_t *targets, float *losses, int64_t rows, int64_t width) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        float *row = x + r * width;
        const float wanted = row[targets[r]], top = greatest(row, width);
        const float total = exponentials(row, width, top);
        scale(row, width, 1.0f / total);
        row[targets[r]] -= 1.0f;
        losses[r] = std::log(total) + top - wanted;
    }
}

// Causal attention inside each document of a row.
void attention(const float *const *tensors, float *out, float *logsums, const int64_t *strides,
               const int64_t *lengths, int64_t documents, int64_t tokens, int64_t heads,
               int64_t shared, int64_t size, int64_t wide, float factor) {
    const View q{const_cast<float *>(tensors[0]), strides[0], strides[1]};
    const View k{const_cast<float *>(tensors[1]), strides[2], strides[3]};
    const View v{const_cast<float *>(tensors[2]), strides[4], strides[5]};
    const View o{out, heads * wide, wide};
    const Sizes sizes{heads, shared, size, wide, factor};
    const auto starts = starts_of(lengths, documents);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < documents * heads; item++) {
        const int64_t d = item / heads, head = item % heads;
        attend(q, k, v, o, logsums + head * tokens, {starts[d], lengths[d]}, head, sizes);
    }
}

// dq [T, H, D], and dk [T, K, D], dv, which are zero at the start.
void attention_backward(const float *const *tensors, const float *gradient, const float *out,
                        const float *logsums, float *const *found, const int64_t *strides, const int64_t *lengths,
                        int64_t documents, int64_t tokens, int64_t heads, int64_t shared,
                        int64_t size, int64_t wide, float factor) {
    const View q{const_cast<float *>(tensors[0]), strides[0], strides[1]};
    const View k{const_cast<float *>(tensors[1]), strides[2], strides[3]};
    const View v{const_cast<float *>(tensors[2]), strides[4], strides[5]};
    const View o{const_cast<float *>(out), heads * wide, wide};
    const Gradients gradients{{const_cast<float *>(gradient), heads * wide, wide},
                              {found[0], heads * size, size},
                              {found[1], shared * size, size},
                              {found[2], shared * wide, wide}};
    const Sizes sizes{heads, shared, size, wide, factor};
    const auto starts = starts_of(lengths, documents);
    const int64_t group = heads / shared;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < documents * shared; item++) {
        const int64_t d = item / shared, first = item % shared * group;
        for (int64_t head = first; head < first + group; head++)
            attend_backward(q, k, v, o, logsums + head * tokens, gradients,
                            {starts[d], lengths[d]}, head, sizes);
    }
}

// added [n] becomes old + factor * added, the product rounded before the sum.
SEPARATE void add_scaled(const uint16_t *old, float *added, int64_t n, float factor) {
    SEPARATELY
    for (int64_t i = 0; i < n; i++)
        added[i] = std::bit_cast<float>(uint32_t{old[i]} << 16) + factor * added[i];
}

SEPARATE void add_scaled_wide(const float *old, float *added, int64_t n, float factor) {
    SEPARATELY
    for (int64_t i = 0; i < n; i++) added[i] = old[i] + factor * added[i];
}

// To the nearest bfloat16, to the even one of two; `odd` becomes 1 if one is not finite.
void round_bfloat16(const float *x, uint16_t *rounded, int32_t *odd, int64_t n) {
    int32_t found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = std::bit_cast<uint32_t>(x[i]);
        const uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        found |= (bits & 0x7f800000) == 0x7f800000 || (nearest & 0x7f80) == 0x7f80;
        rounded[i] = static_cast<uint16_t>(nearest);
    }
    *odd = found;
}

// Blocks of `size` elements in 4 bits, as bitsandbytes packs them: x [n] → packed [(n + 1) / 2] and
// the greatest of each block. An element's code is that of how many of 15 bounds lie below it.
void pack_4bit(const float *x, const float *bounds, const int32_t *codes, uint8_t *packed,
               float *scales, int64_t n, int64_t size) {
    std::vector<int32_t> found(size + 1);
    for (int64_t start = 0; start < n; start += size) {
        const int64_t count = n - start < size ? n - start : size;
        const float *block = x + start;
        float top = 0.0f;
        int32_t odd = 0;
#pragma omp simd reduction(max : top) reduction(| : odd)
        for (int64_t i = 0; i < count; i++) {
            const float a = std::fabs(block[i]);
            top = a > top ? a : top;
            odd |= a != a;
        }
        if (odd) top = NAN;
        const float least = top < 1e-38f ? 1e-38f : top, inverse = 1.0f / least;
        // A last block that is not full is divided, and its scale bounded.
        scales[start / size] = count < size ? least : top;
        for (int64_t i = 0; i < count; i++) {
            float v = count < size ? block[i] / least : block[i] * inverse;
            v = v < -1.0f ? -1.0f : v;
            v = v > 1.0f ? 1.0f : v;
            int32_t below = 0;
            for (int k = 0; k < 15; k++) below += !(v <= bounds[k]);
            found[i] = codes[below];
        }
        if (count % 2) found[count] = codes[7];  // of a zero
        for (int64_t i = 0; i < count; i += 2)
            packed[(start + i) / 2] = static_cast<uint8_t>(found[i] << 4 | found[i + 1]);
    }
}

}  // extern "C"
