/* A whole forward pass of a Llama-like decoder over a ragged batch, from token ids to logits; see pool.h for what all
 * kernels promise.
 *
 * A pass is linear layers, attention, and what lies between them: small steps that treat each row (token) by itself, in
 * a fixed order. Of the last layer, only rows whose logits are wanted go on behind the store of keys and values.
 */
#define _POSIX_C_SOURCE 200112L
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "attention.h"
#include "linear.h"
#include "vector.h"

/* Rows up to which the calling thread does a step alone; more are dealt out in as large pieces. */
enum { ROWS_PER_ITEM = 16, ALIGNMENT = 64 };

/* Fields are all 8 bytes wide, as `redraft/kernels/decoder.py` lays them out. All numbers are fp32. */
typedef struct {
  linear_layer qkv;     /* hidden -> query of every head, keys, values: (heads + 2 kv_heads) * head_dim */
  linear_layer output;  /* heads * head_dim -> hidden */
  linear_layer gate_up; /* hidden -> gate, then up */
  linear_layer down;    /* -> hidden */
  const float *attention_norm, *mlp_norm; /* [hidden] */
} decoder_layer;

typedef struct {
  const decoder_layer *layers;
  linear_layer head;
  const float *embedding, *final_norm; /* [vocab_size, hidden], [hidden] */
  const float *rotary;                 /* [position][cos, sin][head_dim / 2] */
  float *keys, *values;                /* [layers, kv_heads, num_slots, head_dim] */
  const int32_t *output_ids;           /* [num_outputs] id of each output of the head; NULL: output v is id v */
  long num_outputs, logits_width;      /* logits without output_ids: head.n */
  long num_layers, vocab_size, hidden, heads, kv_heads, head_dim, num_slots, block_size;
  double epsilon, scale;
} decoder;

/* A sequence's part of the batch, in the order of the token ids. */
typedef struct {
  int32_t length, start; /* tokens, and the position of the first */
  int32_t wanted;        /* of how many of the last tokens logits are wanted */
  int32_t table;         /* where its block table starts in `blocks` */
} chunk;

typedef struct {
  const decoder *model;
  const decoder_layer *layer;
  const float *norm; /* the next one */
  long rows;
  const int32_t *ids, *blocks;
  int32_t *positions, *slots, *wanted, *items;
  float *outputs, *logits; /* of the head, and where they go */
  float *hidden, *narrow, *wide; /* the residual stream, and by turns what goes into a linear layer and comes out */
  long linear_ns, attention_ns;
} pass;

typedef void (*row_fn)(const pass *p, long row);
typedef struct {
  const pass *pass;
  row_fn function;
} rows_job;

static void rows_item(void *arg, long item) {
  const rows_job *job = arg;
  long row = item * ROWS_PER_ITEM, end = smaller(row + ROWS_PER_ITEM, job->pass->rows);
  for (; row < end; row++) job->function(job->pass, row);
}

static void each_row(const pass *p, row_fn function) {
  rows_job job = {p, function};
  pool_run(rows_item, &job, (p->rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM);
}

/* ---- the steps between linear layers and attention ---- */

/* narrow = RMSNorm of the residual stream */
INLINE void normalise(const pass *p, long row) {
  long n = p->model->hidden;
  const float *x = p->hidden + row * n, *weight = p->norm;
  float *out = p->narrow + row * n;
  __m256 even = _mm256_setzero_ps(), odd = even;
  for (long i = 0; i < n; i += 16) {
    __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + i + 8);
    even = _mm256_fmadd_ps(first, first, even);
    odd = _mm256_fmadd_ps(second, second, odd);
  }
  float mean = sum8(_mm256_add_ps(even, odd)) / (float)n;
  __m256 inverse = _mm256_set1_ps(1.0f / __builtin_sqrtf(mean + (float)p->model->epsilon));
  for (long i = 0; i < n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i), _mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
}

AVX2 static void embed(const pass *p, long row) {
  long n = p->model->hidden;
  memcpy(p->hidden + row * n, p->model->embedding + p->ids[row] * n, n * sizeof(float));
  normalise(p, row);
}

/* What a block has made of the stream is added to it; then the next block's norm. */
AVX2 static void add(const pass *p, long row) {
  long n = p->model->hidden;
  float *x = p->hidden + row * n;
  const float *y = p->wide + row * n;
  for (long i = 0; i < n; i += 8) _mm256_storeu_ps(x + i, _mm256_add_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
  normalise(p, row);
}

/* One head turned by its position's angles, as transformers pairs the dimensions: i with i + head_dim / 2. */
INLINE void rotate(const float *x, const float *restrict angles, float *out, long half) {
  for (long i = 0; i < half; i += 4) {
    __m128 cosine = _mm_loadu_ps(angles + i), sine = _mm_loadu_ps(angles + half + i);
    __m128 a = _mm_loadu_ps(x + i), b = _mm_loadu_ps(x + half + i);
    _mm_storeu_ps(out + i, _mm_fmsub_ps(a, cosine, _mm_mul_ps(b, sine)));
    _mm_storeu_ps(out + half + i, _mm_fmadd_ps(b, cosine, _mm_mul_ps(a, sine)));
  }
}

/* Positions into query and key; the key and the value go to their slot. */
AVX2 static void rotate_and_store(const pass *p, long row) {
  const decoder *model = p->model;
  long dim = model->head_dim, head_slots = model->num_slots * dim;
  const float *angles = model->rotary + p->positions[row] * dim;
  float *query = p->wide + row * p->layer->qkv.n;
  const float *key = query + model->heads * dim, *value = key + model->kv_heads * dim;
  long place = (p->layer - model->layers) * model->kv_heads * head_slots + p->slots[row] * dim;
  for (long head = 0; head < model->heads; head++) rotate(query + head * dim, angles, query + head * dim, dim / 2);
  for (long head = 0; head < model->kv_heads; head++, place += head_slots) {
    rotate(key + head * dim, angles, model->keys + place, dim / 2);
    memcpy(model->values + place, value + head * dim, dim * sizeof(float));
  }
}

/* silu(gate) * up, silu(x) = x / (1 + exp(-x)) by way of exp(-|x|), which cannot overflow */
AVX2 static void activate(const pass *p, long row) {
  long n = p->layer->down.k;
  const float *gate = p->wide + row * p->layer->gate_up.n, *up = gate + n;
  float *out = p->narrow + row * n;
  __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
  for (long i = 0; i < n; i += 8) {
    __m256 x = _mm256_loadu_ps(gate + i);
    __m256 small = exp_negative(_mm256_or_ps(x, sign));
    __m256 sigmoid = _mm256_div_ps(_mm256_blendv_ps(one, small, x), _mm256_add_ps(one, small));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_mul_ps(x, sigmoid), _mm256_loadu_ps(up + i)));
  }
}

/* The head's outputs to their ids; no other id can be drawn. */
AVX2 static void spread(const pass *p, long row) {
  const decoder *model = p->model;
  float *logits = p->logits + row * model->logits_width;
  const float *outputs = p->outputs + row * model->head.n;
  for (long i = 0; i < model->logits_width; i++) logits[i] = -__builtin_inff();
  for (long i = 0; i < model->num_outputs; i++) logits[model->output_ids[i]] = outputs[i];
}

/* ---- a pass ---- */

static long now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000L + time.tv_nsec;
}

static int linear(pass *p, const linear_layer *layer, const float *x, float *y) {
  long started = now_ns();
  int status = linear_run(layer, x, y, p->rows);
  p->linear_ns += now_ns() - started;
  return status;
}

/* Work items for all queries, or those of wanted rows only. Returns their number. */
static long plan_attention(const pass *p, const chunk *chunks, long num_chunks, int only_wanted) {
  long count = 0, first = 0;
  for (const chunk *c = chunks; c < chunks + num_chunks; first += c++->length)
    for (long done = only_wanted ? c->length - c->wanted : 0; done < c->length; done += QUERIES_PER_ITEM) {
      long queries = smaller(c->length - done, QUERIES_PER_ITEM);
      int32_t item[4] = {(int32_t)(first + done), (int32_t)queries, (int32_t)(c->start + done), c->table};
      memcpy(p->items + 4 * count++, item, sizeof item);
    }
  return count;
}

/* From the queries in `wide` to the mixed values in `narrow`. */
static int attention(pass *p, long num_items) {
  const decoder *model = p->model;
  long started = now_ns(), layer = p->layer - model->layers;
  long place = layer * model->kv_heads * model->num_slots * model->head_dim;
  attention_job job = {
      .query = p->wide, .keys = model->keys + place, .values = model->values + place, .output = p->narrow,
      .items = p->items, .blocks = p->blocks, .query_stride = p->layer->qkv.n, .heads = model->heads,
      .kv_heads = model->kv_heads, .head_dim = model->head_dim, .num_slots = model->num_slots,
      .block_size = model->block_size, .table_width = 1, .scale = (float)model->scale};
  int status = attention_run(&job, num_items);
  p->attention_ns += now_ns() - started;
  return status;
}

/* Move the wanted rows, in ascending order, to the front. */
static void keep_wanted(pass *p, long num_wanted) {
  long hidden = p->model->hidden, mixed = p->model->heads * p->model->head_dim;
  for (long i = 0; i < num_wanted; i++) {
    long row = p->wanted[i];
    if (row == i) continue;
    memcpy(p->hidden + i * hidden, p->hidden + row * hidden, hidden * sizeof(float));
    memcpy(p->narrow + i * mixed, p->narrow + row * mixed, mixed * sizeof(float));
  }
  p->rows = num_wanted;
}

static int run(pass *p, const chunk *chunks, long num_chunks, long num_wanted) {
  const decoder *model = p->model;
  long num_items = plan_attention(p, chunks, num_chunks, 0);
  p->norm = model->layers[0].attention_norm;
  each_row(p, embed);
  for (long i = 0; i < model->num_layers; i++) {
    const decoder_layer *layer = p->layer = model->layers + i;
    int is_last = i + 1 == model->num_layers;
    if (linear(p, &layer->qkv, p->narrow, p->wide)) return -1;
    each_row(p, rotate_and_store);
    if (is_last && !num_wanted) return 0;
    if (is_last) num_items = plan_attention(p, chunks, num_chunks, 1);
    if (attention(p, num_items)) return -1;
    if (is_last) keep_wanted(p, num_wanted);
    if (linear(p, &layer->output, p->narrow, p->wide)) return -1;
    p->norm = layer->mlp_norm;
    each_row(p, add);
    if (linear(p, &layer->gate_up, p->narrow, p->wide)) return -1;
    each_row(p, activate);
    if (linear(p, &layer->down, p->narrow, p->wide)) return -1;
    p->norm = is_last ? model->final_norm : layer[1].attention_norm;
    each_row(p, add);
  }
  if (linear(p, &model->head, p->narrow, p->outputs)) return -1;
  if (model->output_ids) each_row(p, spread);
  return 0;
}

/* ---- setting one up ---- */

/* Share out working memory for `p->rows` rows; 0, or -1 if it ran out. */
static int allocate(pass *p, long num_wanted) {
  static scratch held;
  const decoder *model = p->model;
  long narrow = larger(model->hidden, model->heads * model->head_dim), wide = model->hidden;
  for (long i = 0; i < model->num_layers; i++) {
    narrow = larger(narrow, model->layers[i].down.k);
    wide = larger(wide, larger(model->layers[i].qkv.n, model->layers[i].gate_up.n));
  }
  long rows = (p->rows + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; /* every part stays aligned */
  long outputs = model->output_ids ? num_wanted * model->head.n : 0;
  float *floats = scratch_take(
      &held, (rows * (model->hidden + narrow + wide) + outputs) * sizeof(float) + 7 * rows * sizeof(int32_t));
  if (!floats) return -1;
  p->hidden = floats;
  p->narrow = p->hidden + rows * model->hidden;
  p->wide = p->narrow + rows * narrow;
  p->outputs = p->wide + rows * wide;
  p->positions = (int32_t *)(p->outputs + outputs);
  if (!model->output_ids) p->outputs = p->logits;
  p->slots = p->positions + rows;
  p->wanted = p->slots + rows;
  p->items = p->wanted + rows;
  return 0;
}

/* Where every row stands in its sequence and in the cache. 0, or -2: an id is out of range. */
static int place_rows(pass *p, const chunk *chunks, long num_chunks) {
  const decoder *model = p->model;
  long row = 0, wanted = 0;
  for (const chunk *c = chunks; c < chunks + num_chunks; c++) {
    const int32_t *table = p->blocks + c->table;
    for (long i = 0; i * model->block_size < c->start + c->length; i++)
      if (table[i] < 0 || (table[i] + 1) * model->block_size > model->num_slots) return -2;
    for (long i = 0; i < c->length; i++, row++) {
      long position = c->start + i;
      if (p->ids[row] < 0 || p->ids[row] >= model->vocab_size) return -2;
      p->positions[row] = (int32_t)position;
      p->slots[row] = (int32_t)(table[position / model->block_size] * model->block_size + position % model->block_size);
      if (i >= c->length - c->wanted) p->wanted[wanted++] = (int32_t)row;
    }
  }
  return 0;
}

/* Store the chunks' keys and values, and write logits [sum of wanted, logits_width]. `ids` has the chunks' tokens one
 * after another, `blocks` all their block tables, each long enough for its chunk, and rotary an entry for every position.
 * `spent`: [2] nanoseconds in linear layers and in attention. Returns 0, -1 if memory ran out, or -2 if a token or block
 * id is out of range; then nothing was stored. */
int redraft_decode(const decoder *model, const int32_t *ids, const chunk *chunks, long num_chunks, const int32_t *blocks,
                   float *logits, long *spent) {
  pass p = {.model = model, .ids = ids, .blocks = blocks, .logits = logits};
  long num_wanted = 0;
  for (long i = 0; i < num_chunks; i++) p.rows += chunks[i].length, num_wanted += chunks[i].wanted;
  spent[0] = spent[1] = 0;
  if (!p.rows) return 0;
  pool_enter();
  int status = allocate(&p, num_wanted);
  if (!status) status = place_rows(&p, chunks, num_chunks);
  if (!status) status = run(&p, chunks, num_chunks, num_wanted);
  pool_leave();
  spent[0] = p.linear_ns, spent[1] = p.attention_ns;
  return status;
}
