/* A mixture of counted experts, byte after byte. See experts.py for what each expert is; its torch
   form is the definition that this one is compared with. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define V 256
#define MOST 64        /* experts */
#define MOST_HIDDEN 256 /* units of the gate */
#define BLOCK 256 /* places compared at a time */
#define SHORTEST 3 /* bytes of context that a match has at least */

typedef struct { /* one length of context of an n-gram model */
    int64_t contexts;
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
    const float *weight_in, *bias_in, *weight_out, *bias_out;
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
        uint64_t any[BLOCK / 8], all = 0;
        int64_t from = high - BLOCK < low + SHORTEST ? low + SHORTEST : high - BLOCK;
        const uint8_t *p = text + from;
        int n = (int)(high - from);
        if (n == BLOCK)
            for (int i = 0; i < BLOCK; i++) same[i] = (p[i - 1] == a) & (p[i - 2] == b) & (p[i - 3] == c);
        else {
            memset(same, 0, sizeof same);
            for (int i = 0; i < n; i++) same[i] = (p[i - 1] == a) & (p[i - 2] == b) & (p[i - 3] == c);
        }
        memcpy(any, same, sizeof any);
        for (int i = 0; i < BLOCK / 8; i++) all |= any[i];
        for (int i = n - 1; all && i >= 0; i--) {
            if (!same[i]) continue;
            int64_t place = from + i, length = SHORTEST;
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

static int64_t lower_bound(const int64_t *key, int64_t n, int64_t wanted) {
    int64_t from = 0;
    while (n > 0) {
        int64_t half = n >> 1;
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

static int experts(const Mixture *m, const uint8_t *text, int64_t first, int64_t at,
                   const float *others, Expert *out) {
    int made = 0;
    Expert step[2];
    int64_t node = 0;
    int turn = 0;
    for (int w = 0; w < V; w++) step[1].p[w] = 1.0f / V;
    for (int64_t i = 0; i < m->levels; i++, turn ^= 1) {
        const Level *level = &m->level[i];
        if (i && node >= 0) {
            int64_t wanted = node * V + text[at - i], found = lower_bound(level->key, level->contexts, wanted);
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
    for (int64_t i = 0; i < m->others; i++) {
        memcpy(out[made].p, others + i * V, sizeof out->p);
        out[made].total = out[made].distinct = 0;
        made++;
    }
    return made;
}

/* What the gate reads of n experts: FEATURES numbers of each. */
static void read_features(const Expert *expert, int n, float *feature) {
    for (int e = 0; e < n; e++) {
        float best = 0, square = 0;
        for (int w = 0; w < V; w++) {
            best = expert[e].p[w] > best ? expert[e].p[w] : best;
            square += expert[e].p[w] * expert[e].p[w];
        }
        feature[4 * e] = best, feature[4 * e + 1] = square;
        feature[4 * e + 2] = (float)(log2(1 + expert[e].total) / 8);
        feature[4 * e + 3] = (float)(expert[e].distinct / (1 + expert[e].total));
    }
}

static void mix(const Mixture *m, const Expert *expert, int n, float *log_p) {
    float feature[4 * MOST], hidden[MOST_HIDDEN], weight[MOST], top = -INFINITY, sum = 0, p[V];
    read_features(expert, n, feature);
    for (int64_t h = 0; h < m->hidden; h++) {
        float x = m->bias_in[h];
        for (int i = 0; i < 4 * n; i++) x += m->weight_in[h * 4 * n + i] * feature[i];
        hidden[h] = tanhf(x);
    }
    for (int e = 0; e < n; e++) {
        weight[e] = m->bias_out[e];
        for (int64_t h = 0; h < m->hidden; h++) weight[e] += m->weight_out[e * m->hidden + h] * hidden[h];
        top = weight[e] > top ? weight[e] : top;
    }
    for (int e = 0; e < n; e++) sum += weight[e] = expf(weight[e] - top);
    memset(p, 0, sizeof p);
    for (int e = 0; e < n; e++)
        for (int w = 0; w < V; w++) p[w] += weight[e] / sum * expert[e].p[w];
    for (int w = 0; w < V; w++) log_p[w] = logf(p[w]);
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
    Expert expert[MOST];
    for (int64_t at = piece->begin; at < piece->end; at++) {
        int n = experts(piece->m, piece->text, piece->first, at, piece->others, expert);
        if (piece->others) piece->others += piece->m->others * V;
        if (piece->gated) {
            mix(piece->m, expert, n, piece->out);
            piece->out += V;
            continue;
        }
        read_features(expert, n, piece->feature);
        piece->feature += 4 * n;
        for (int e = 0; e < n; e++) *piece->out++ = expert[e].p[piece->text[at]];
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
    int64_t share = (end - begin + threads - 1) / threads, n = 0;
    for (int64_t i = 0; i < m->levels; i++) n += m->level[i].is_expert;
    n += m->tables + m->matches + m->others;
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
