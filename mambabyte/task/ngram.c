/* Counting of n-grams on the CPU: the sort of all contexts, and the step from one length of context
   to the next shorter one; and looking up what the tables say. See ngram.py for what they mean. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BUCKETS 65536 /* of the two most significant key bytes */
#define SHARED 64     /* contexts whose longer ones are looked for together */
#define FEW 20        /* as many items are sorted by insertion */

/* The key is the context from its newest byte on, then the byte itself: 16 bytes at most, the first
   in the top bits. */
typedef struct {
    uint64_t high, low;
    int32_t place;
} Item;

typedef struct {
    Item *items, *spare;
    const int64_t *start;
    int order;
    int next; /* first bucket that nobody has taken */
} Work;

static inline int byte_of(const Item *item, int rank) {
    return (int)(((rank < 8 ? item->high : item->low) >> (8 * (7 - (rank & 7)))) & 255);
}

static inline int less(const Item *a, const Item *b) {
    return a->high < b->high || (a->high == b->high && a->low < b->low);
}

static void sort_items(Item *items, Item *spare, int64_t n, int rank, int order) {
    if (n <= FEW) {
        for (int64_t i = 1; i < n; i++) {
            Item item = items[i];
            int64_t j = i;
            for (; j > 0 && less(&item, &items[j - 1]); j--) items[j] = items[j - 1];
            items[j] = item;
        }
        return;
    }
    if (rank == order) return;
    int64_t start[257] = {0}, at[256];
    for (int64_t i = 0; i < n; i++) start[byte_of(&items[i], rank) + 1]++;
    for (int b = 0; b < 256; b++) start[b + 1] += start[b];
    memcpy(at, start, sizeof at);
    int first = byte_of(items, rank);
    if (start[first + 1] - start[first] < n) { /* more than one value */
        for (int64_t i = 0; i < n; i++) spare[at[byte_of(&items[i], rank)]++] = items[i];
        memcpy(items, spare, (size_t)n * sizeof *items);
    }
    for (int b = 0; b < 256; b++)
        if (start[b + 1] - start[b] > 1)
            sort_items(items + start[b], spare + start[b], start[b + 1] - start[b], rank + 1, order);
}

static void *sort_buckets(void *argument) {
    Work *work = argument;
    for (;;) {
        int bucket = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (bucket >= BUCKETS) return NULL;
        int64_t from = work->start[bucket], n = work->start[bucket + 1] - from;
        if (n > 1)
            sort_items(work->items + from, work->spare + from, n, work->order < 2 ? work->order : 2,
                       work->order);
    }
}

static Item item_at(const uint8_t *text, int64_t position, int order) {
    uint64_t half[2] = {0, 0};
    const uint8_t *symbol = text + position + order - 1;
    for (int rank = 0; rank < order; rank++) {
        uint64_t byte = rank == order - 1 ? *symbol : symbol[-1 - rank];
        half[rank >> 3] |= byte << (8 * (7 - (rank & 7)));
    }
    return (Item){half[0], half[1], (int32_t)position};
}

/* Sort the n positions of text (n + order - 1 bytes, order <= 16). place: the positions in order;
   common: how many leading key bytes each shares with the one before it. 0, or -1 without memory. */
int sort_contexts(const uint8_t *text, int64_t n, int order, int threads, int32_t *place,
                  uint8_t *common) {
    Item *items = malloc((size_t)n * sizeof *items), *spare = malloc((size_t)n * sizeof *spare);
    int64_t *start = calloc(2 * (BUCKETS + 1), sizeof *start), *at = start + BUCKETS + 1;
    if (!items || !spare || !start) {
        free(items), free(spare), free(start);
        return -1;
    }
    for (int64_t i = 0; i < n; i++) start[(item_at(text, i, order).high >> 48) + 1]++;
    for (int b = 0; b < BUCKETS; b++) start[b + 1] += start[b];
    memcpy(at, start, BUCKETS * sizeof *at);
    for (int64_t i = 0; i < n; i++) {
        Item item = item_at(text, i, order);
        items[at[item.high >> 48]++] = item;
    }
    Work work = {items, spare, start, order, 0};
    pthread_t thread[64];
    int running = 0;
    for (; running < threads - 1 && running < 64; running++)
        if (pthread_create(&thread[running], NULL, sort_buckets, &work)) break;
    sort_buckets(&work);
    for (int i = 0; i < running; i++) pthread_join(thread[i], NULL);
    for (int64_t i = 0; i < n; i++) {
        place[i] = items[i].place;
        uint64_t high = i ? items[i].high ^ items[i - 1].high : ~0ull;
        uint64_t low = i ? items[i].low ^ items[i - 1].low : ~0ull;
        int same = high ? __builtin_clzll(high) >> 3 : low ? 8 + (__builtin_clzll(low) >> 3) : 16;
        common[i] = (uint8_t)(same < order ? same : order);
    }
    free(items), free(spare), free(start);
    return 0;
}

/* From the pairs after contexts of m + 1 bytes to those after m bytes. Context i of the m-byte ones
   has the longer ones child[i] .. child[i + 1]; those have pairs start[c] .. start[c + 1]. Counts
   are added up, or each counts once with ``continuation``. Returns how many pairs came out. */
int64_t shorten(int64_t contexts, const int64_t *child, const int32_t *start, const uint8_t *symbol,
                const int32_t *count, int continuation, int32_t *start_out, int32_t *total_out,
                uint8_t *symbol_out, int32_t *count_out) {
    int64_t out = 0;
    for (int64_t i = 0; i < contexts; i++) {
        int32_t sums[256];
        uint64_t seen[4] = {0, 0, 0, 0};
        start_out[i] = (int32_t)out;
        int64_t total = 0;
        for (int64_t p = start[child[i]]; p < start[child[i + 1]]; p++) {
            int s = symbol[p];
            uint64_t bit = 1ull << (s & 63);
            int32_t c = continuation ? 1 : count[p];
            sums[s] = (seen[s >> 6] & bit) ? sums[s] + c : c;
            seen[s >> 6] |= bit;
            total += c;
        }
        for (int w = 0; w < 4; w++)
            for (uint64_t rest = seen[w]; rest; rest &= rest - 1) {
                int s = 64 * w + __builtin_ctzll(rest);
                symbol_out[out] = (uint8_t)s;
                count_out[out++] = sums[s];
            }
        total_out[i] = (int32_t)total;
    }
    start_out[contexts] = (int32_t)out;
    return out;
}

typedef struct { /* the tables of one length of context, as in ngram.py and guide.py */
    int64_t contexts;
    const int32_t *begin; /* see _begins of ngram_native.py */
    const int64_t *key;
    const int32_t *start, *total;
    const uint8_t *symbol;
    const int32_t *count;
    const uint8_t *keep; /* NULL: all */
    const uint8_t *best; /* NULL: not asked for */
} Level;

/* Where the context `node` of the length below, one byte longer, is among the keys; -1: nowhere. */
static int64_t find_key(const Level *level, int64_t node, uint8_t byte) {
    const int64_t wanted = node * 256 + byte;
    int64_t low = level->begin[node / SHARED], high = level->begin[node / SHARED + 1];
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (level->key[middle] < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return low < level->contexts && level->key[low] == wanted ? low : -1;
}

/* With discounts (order, 3) of counts of 1, 2 and more; after each of n contexts (n, order - 1), the newest byte last: log p (n, 256); and where tables
   have `best`, the most frequent byte after the longest context seen, and how long and how clear
   that is, 4 classes a length. */
void look_up(const Level *levels, int64_t order, const double *discounts, int64_t n,
             const uint8_t *contexts, float *log_p, uint8_t *best, uint8_t *kind) {
    for (int64_t i = 0; i < n; i++) {
        const uint8_t *newest = contexts + (i + 1) * (order - 1);
        double p[256];
        for (int s = 0; s < 256; s++) p[s] = 1.0 / 256;
        best[i] = kind[i] = 0;
        int64_t node = 0;
        for (int64_t m = 0; m < order; m++) {
            const Level *level = levels + m;
            if (m) node = find_key(level, node, newest[-m]);
            if (node < 0) break; /* nor were longer ones */
            const int32_t from = level->start[node], to = level->start[node + 1];
            const int32_t total = level->total[node];
            if (!level->keep || level->keep[node]) {
                double left = 0, off[256]; /* no byte is there twice */
                for (int32_t pair = from; pair < to; pair++) {
                    const int32_t count = level->count[pair];
                    left += off[pair - from] = discounts[3 * m + (count > 3 ? 3 : count) - 1];
                }
                for (int s = 0; s < 256; s++) p[s] *= left / total;
                for (int32_t pair = from; pair < to; pair++)
                    p[level->symbol[pair]] += (level->count[pair] - off[pair - from]) / total;
            }
            if (!level->best) continue;
            int32_t top = 0;
            for (int32_t pair = from; pair < to; pair++)
                if (level->count[pair] > top) top = level->count[pair];
            best[i] = level->best[node];
            kind[i] = (uint8_t)(4 * m + (to - from == 1 ? total > 1
                                                        : 2 + (5 * (int64_t)top >= 4 * (int64_t)total)));
        }
        for (int s = 0; s < 256; s++) log_p[i * 256 + s] = (float)log(p[s]);
    }
}
