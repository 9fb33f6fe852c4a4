/* A mixture of counted experts, byte after byte. See experts.py for what each expert is; its torch
   form is the definition that this one is compared with. */

#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define V 256
#define MOST 64        /* experts */
#define MOST_HIDDEN 256 /* units of the gate */
#define BLOCK 256 /* places compared at a time */
#define SHORTEST 3 /* bytes of context that a match has at least */
#define SHARED 64 /* contexts whose longer ones are looked for together, as in ngram.c */
#define TOGETHER 8 /* experts whose sums are added up in turn */
#define LANES 16

typedef struct { /* one length of context of an n-gram model */
    int64_t contexts;
    const int32_t *begin; /* see _begins of ngram_native.py */
    const int64_t *key;
    const int32_t *start, *total;
    const uint8_t *symbol;
    const int32_t *count;
    double discount[3];
    int64_t is_expert;
} Level;

typedef struct { /* counts after contexts that are known by a hash */
    int64_t pairs;
    const int64_t *key;
    const int32_t *count;
    double discount[3];
    int64_t length, words, skip, fold;
} Table;

typedef struct {
    int64_t levels, tables, matches, others, hidden, reach, newest;
    const Level *level;
    const Table *table;
    const int64_t *match; /* bytes of context, ascending */
    double match_discount;
    const float *weight_in, *bias_in, *weight_out, *bias_out; /* a row an input, a number an output */
} Mixture;

typedef struct {
    float p[V];
    double total, distinct;
} Expert;

/* ---------------------------------------------------------------------- matches in what came last */

/* Counts of the bytes that came after the ``newest`` latest places whose last match[k] bytes are
   those before ``at``, for every k. Places and their contexts lie in text[low .. at). */
static void matched(const uint8_t *text, int64_t low, int64_t at, const int64_t *match, int kinds,
                    int64_t newest, uint16_t (*counts)[V]) {
    int64_t found[MOST] = {0}, longest = match[kinds - 1];
    memset(counts, 0, (size_t)kinds * sizeof *counts);
    if (at - low <= SHORTEST) return;
    uint8_t a = text[at - 1], b = text[at - 2], c = text[at - 3];
    for (int64_t high = at; high > low + SHORTEST && found[kinds - 1] < newest;) {
        uint8_t same[BLOCK];
        uint64_t words[BLOCK / 8], all = 0;
        int64_t from = high - BLOCK < low + SHORTEST ? low + SHORTEST : high - BLOCK;
        const uint8_t *p = text + from;
        int n = (int)(high - from);
        if (n == BLOCK)
            for (int i = 0; i < BLOCK; i++) same[i] = (p[i - 1] == a) & (p[i - 2] == b) & (p[i - 3] == c);
        else {
            memset(same, 0, sizeof same);
            for (int i = 0; i < n; i++) same[i] = (p[i - 1] == a) & (p[i - 2] == b) & (p[i - 3] == c);
        }
        memcpy(words, same, sizeof words);
        for (int i = 0; i < BLOCK / 8; i++) all |= words[i];
        for (int i = BLOCK / 8 - 1; all && i >= 0; i--)
            while (words[i]) { /* the latest place first, which is in the top bits */
                int last = (63 - __builtin_clzll(words[i])) / 8;
                int64_t place = from + 8 * i + last, length = SHORTEST;
                words[i] &= ~(1ull << 8 * last);
                while (length < longest && place - length > low && text[place - length - 1] == text[at - length - 1])
                    length++;
                for (int k = 0; k < kinds && length >= match[k]; k++)
                    if (found[k] < newest) {
                        counts[k][text[place]]++;
                        found[k]++;
                    }
            }
        high = from;
    }
}

/* ------------------------------------------------------------------------------------- the mixture */

/* Of two places one is looked at next: both are fetched before that is known. */
static int64_t lower_bound(const int64_t *key, int64_t n, int64_t wanted) {
    int64_t from = 0;
    while (n > 0) {
        int64_t half = n >> 1;
        __builtin_prefetch(&key[from + (half >> 1)]);
        __builtin_prefetch(&key[from + half + 1 + ((n - half - 1) >> 1)]);
        if (key[from + half] < wanted) from += half + 1, n -= half + 1;
        else n = half;
    }
    return from;
}

static inline int is_letter(uint8_t b) {
    return (b >= 'a' && b <= 'z') || (b >= 'A' && b <= 'Z') || b >= 0x80;
}

/* See experts.py: hash of the bytes of a context, 55 bits. */
static int64_t hashed(const uint8_t *text, int64_t at, const Table *table) {
    int64_t end = at - table->skip, length = table->length;
    if (table->words) {
        int64_t n = 0, left = table->words;
        for (; n < length; n++)
            if (!is_letter(text[end - 1 - n]) && --left == 0) break;
        length = n;
    }
    uint64_t sum = 0, power = 1;
    for (int64_t j = end - length; j < end; j++) {
        uint8_t b = text[j];
        if (table->fold && b >= 'A' && b <= 'Z') b += 32;
        sum += (uint64_t)(b + 1) * power;
        power *= 0x9E3779B97F4A7C15ull;
    }
    return (int64_t)((sum * 0xD6E8FEB86659FD93ull) >> 9);
}

static inline double off(int32_t count, const double *discount) {
    return discount[count > 3 ? 2 : count - 1];
}

/* p of the next expert from that of ``base``: discounted counts, and what they leave of the base. */
static void counted(Expert *out, const float *base, int64_t n, const uint8_t *symbol, const int64_t *key,
                    const int32_t *count, double total, const double *discount) {
    out->total = total, out->distinct = (double)n;
    if (!n) {
        memcpy(out->p, base, sizeof out->p);
        return;
    }
    double left = 0;
    for (int64_t i = 0; i < n; i++) left += off(count[i], discount);
    float share = (float)(left / total);
    for (int w = 0; w < V; w++) out->p[w] = share * base[w];
    for (int64_t i = 0; i < n; i++) {
        int w = symbol ? symbol[i] : (int)(key[i] & 255);
        out->p[w] += (float)((count[i] - off(count[i], discount)) / total);
    }
}

static int experts(const Mixture *m, const uint8_t *text, int64_t first, int64_t at, Expert *out) {
    int made = 0;
    Expert step[2];
    int64_t node = 0;
    int turn = 0;
    for (int w = 0; w < V; w++) step[1].p[w] = 1.0f / V;
    for (int64_t i = 0; i < m->levels; i++, turn ^= 1) {
        const Level *level = &m->level[i];
        if (i && node >= 0) {
            int64_t wanted = node * V + text[at - i], from = level->begin[node / SHARED];
            int64_t found = from + lower_bound(level->key + from, level->begin[node / SHARED + 1] - from, wanted);
            node = found < level->contexts && level->key[found] == wanted ? found : -1;
        }
        int64_t from = node < 0 ? 0 : level->start[node], n = node < 0 ? 0 : level->start[node + 1] - from;
        counted(&step[turn], step[turn ^ 1].p, n, level->symbol + from, NULL, level->count + from,
                node < 0 ? 0 : level->total[node], level->discount);
        if (level->is_expert) out[made++] = step[turn];
    }
    const float *base = step[turn ^ 1].p;
    for (int64_t i = 0; i < m->tables; i++) {
        const Table *table = &m->table[i];
        int64_t key = hashed(text, at, table) << 8;
        int64_t from = lower_bound(table->key, table->pairs, key), n = 0;
        double total = 0;
        for (; from + n < table->pairs && table->key[from + n] >> 8 == key >> 8; n++)
            total += table->count[from + n];
        counted(&out[made++], base, n, NULL, table->key + from, table->count + from, total, table->discount);
    }
    if (m->matches) {
        uint16_t counts[MOST][V];
        double discount[3] = {m->match_discount, m->match_discount, m->match_discount};
        int64_t low = at - m->reach > first ? at - m->reach : first;
        matched(text, low, at, m->match, (int)m->matches, m->newest, counts);
        for (int64_t k = 0; k < m->matches; k++) {
            uint8_t symbol[V];
            int32_t count[V];
            int64_t n = 0;
            double total = 0;
            for (int w = 0; w < V; w++)
                if (counts[k][w]) symbol[n] = (uint8_t)w, total += count[n++] = counts[k][w];
            counted(&out[made++], base, n, symbol, NULL, count, total, discount);
            base = out[made - 1].p;
        }
    }
    return made;
}

/* What the gate reads of the experts from .. to: FEATURES numbers of each. Several experts in turn, as
   a sum alone waits for each of its additions. */
static void read_features(const Expert *expert, int from, int to, float *feature) {
    for (int e = from; e < to; e += TOGETHER) {
        int n = to - e < TOGETHER ? to - e : TOGETHER;
        float square[TOGETHER] = {0};
        for (int w = 0; w < V; w++)
            for (int i = 0; i < TOGETHER; i++) {
                float p = expert[e + (i < n ? i : 0)].p[w];
                square[i] += p * p;
            }
        for (int i = 0; i < n; i++) {
            const Expert *one = &expert[e + i];
            float *f = feature + 4 * (e + i), best[LANES] = {0};
            for (int w = 0; w < V; w += LANES)
                for (int j = 0; j < LANES; j++) best[j] = one->p[w + j] > best[j] ? one->p[w + j] : best[j];
            for (int j = 1; j < LANES; j++) best[0] = best[j] > best[0] ? best[j] : best[0];
            f[0] = best[0], f[1] = square[i];
            f[2] = (float)(log2(1 + one->total) / 8);
            f[3] = (float)(one->distinct / (1 + one->total));
        }
    }
}

/* Add to the hidden units what features from .. to give them; in that order, whoever adds them. */
static void excite(const Mixture *m, const float *feature, int from, int to, float *restrict hidden) {
    for (int i = from; i < to; i++) {
        const float *weight = m->weight_in + i * m->hidden;
        for (int64_t h = 0; h < m->hidden; h++) hidden[h] += weight[h] * feature[i];
    }
}

/* What is known of a place before the experts that are not counted are. */
typedef struct {
    float feature[4 * MOST], hidden[MOST_HIDDEN];
    Expert expert[MOST]; /* the others last; there is memory for those that there are */
} Found;

static int counted_experts(const Mixture *m) {
    int n = (int)(m->tables + m->matches);
    for (int64_t i = 0; i < m->levels; i++) n += m->level[i].is_expert != 0;
    return n;
}

int64_t found_bytes(const Mixture *m) {
    return (int64_t)(offsetof(Found, expert) + (counted_experts(m) + m->others) * sizeof(Expert));
}

/* The counted experts at the place ``at`` of text, of which all before ``first`` is padding. */
void look_up(const Mixture *m, const uint8_t *text, int64_t first, int64_t at, Found *found) {
    int n = experts(m, text, first, at, found->expert);
    read_features(found->expert, 0, n, found->feature);
    if (m->hidden) memcpy(found->hidden, m->bias_in, (size_t)m->hidden * sizeof(float));
    excite(m, found->feature, 0, 4 * n, found->hidden);
}

/* Add the others, (m->others, V): probabilities of experts that are not counted. Returns how many
   experts there are. */
static int join(const Mixture *m, const float *others, Found *found) {
    int n = counted_experts(m), all = n + (int)m->others;
    for (int e = n; e < all; e++, others += V) {
        memcpy(found->expert[e].p, others, sizeof found->expert[e].p);
        found->expert[e].total = found->expert[e].distinct = 0;
    }
    read_features(found->expert, n, all, found->feature);
    excite(m, found->feature, 4 * n, 4 * all, found->hidden);
    return all;
}

/* Log p of the mixture at a place where ``look_up`` has been, to be asked once; returns whether it is
   nan. */
int mix(const Mixture *m, const float *others, Found *found, float *log_p) {
    float weight[MOST], top = -INFINITY, sum = 0, p[V];
    const Expert *expert = found->expert;
    int n = join(m, others, found);
    memcpy(weight, m->bias_out, (size_t)n * sizeof(float));
    for (int64_t h = 0; h < m->hidden; h++) {
        float x = tanhf(found->hidden[h]);
        for (int e = 0; e < n; e++) weight[e] += m->weight_out[h * n + e] * x;
    }
    for (int e = 0; e < n; e++) top = weight[e] > top ? weight[e] : top;
    for (int e = 0; e < n; e++) sum += weight[e] = expf(weight[e] - top);
    memset(p, 0, sizeof p);
    for (int e = 0; e < n; e++)
        for (int w = 0; w < V; w++) p[w] += weight[e] / sum * expert[e].p[w];
    for (int w = 0; w < V; w++) log_p[w] = logf(p[w]);
    return isnan(log_p[0]); /* of a weight or a probability that is nan all are */
}

typedef struct {
    const Mixture *m;
    const uint8_t *text;
    int64_t first, begin, end;
    const float *others;
    int gated;
    float *out, *feature;
} Piece;

static void *do_piece(void *argument) {
    Piece *piece = argument;
    Found place;
    for (int64_t at = piece->begin; at < piece->end; at++) {
        look_up(piece->m, piece->text, piece->first, at, &place);
        if (piece->gated) {
            mix(piece->m, piece->others, &place, piece->out);
            piece->out += V;
        } else {
            int n = join(piece->m, piece->others, &place);
            memcpy(piece->feature, place.feature, (size_t)(4 * n) * sizeof(float));
            piece->feature += 4 * n;
            for (int e = 0; e < n; e++) *piece->out++ = place.expert[e].p[piece->text[at]];
        }
        if (piece->others) piece->others += piece->m->others * V;
    }
    return NULL;
}

/* At the places begin .. end of text, of which all before ``first`` is padding; others (end - begin,
   m->others, V): probabilities of experts that are not counted. If gated, out (end - begin, V) is
   log p of the mixture; else out (end - begin, E) is what each expert gave the byte that came, and
   feature (end - begin, 4 * E) what the gate reads. */
void mixture(const Mixture *m, const uint8_t *text, int64_t first, int64_t begin, int64_t end,
             const float *others, int threads, int gated, float *out, float *feature) {
    Piece piece[64];
    pthread_t thread[64];
    int running[64] = {0};
    int64_t share = (end - begin + threads - 1) / threads, n = counted_experts(m) + m->others;
    for (int i = 0; i < threads; i++) {
        int64_t from = begin + i * share < end ? begin + i * share : end;
        int64_t to = from + share < end ? from + share : end, done = from - begin;
        piece[i] = (Piece){m, text, first, from, to, others ? others + done * m->others * V : NULL,
                           gated, out + done * (gated ? V : n), gated ? NULL : feature + done * 4 * n};
        running[i] = i + 1 < threads && !pthread_create(&thread[i], NULL, do_piece, &piece[i]);
        if (!running[i]) do_piece(&piece[i]);
    }
    for (int i = 0; i < threads; i++)
        if (running[i]) pthread_join(thread[i], NULL);
}
