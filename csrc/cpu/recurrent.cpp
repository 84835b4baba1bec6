// recurrent.cpp - the loop over time steps: the input's product for a span of steps, then the steps one by one.
//
// Threads share the recurrence by directions and by blocks of sequences, which need not wait for each other, or by
// hidden units, with a barrier a step; then a thread meets the same part of the weight in every step, which stays in
// its cache. What a thread computes does not depend on how the work was shared: the same bits with any number of
// threads.
#include "cpu/recurrent.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/recurrent_gates.h"
#include "cpu/scratch.h"

namespace lepton {
namespace {

// Bytes of x W_i^T that are made at a time, few enough that they are read back from a second-level cache: this many
// times the weight's, so that reading the weight again for the next span costs little, within limits.
constexpr int64_t kSpanPerWeight = 4, kLeastSpanBytes = 256 * 1024, kMostSpanBytes = 2 * 1024 * 1024;
// Multiplications below which a second thread costs more than it saves: in all steps, and in one step with a barrier.
constexpr int64_t kParallelWork = 400 * 1000;
constexpr int64_t kBarrierWork = 400 * 1000;
// Sequences are dealt to threads only in blocks of this many.
constexpr int kLeastRows = 8;
// The largest weight that every thread's cache holds: second-level caches have 1 MiB or more.
constexpr int64_t kSharedWeightBytes = 1024 * 1024;
// Rows of a span up to which each thread multiplies them by its own part of the input's weight: again, it meets that
// part in every call. More rows are better shared out anew.
constexpr int kOwnRows = 64;

// Some sequences of one direction, and some of its hidden units: what a thread advances by a step.
struct Part {
  int direction;
  int row, rows;
  int block, blocks;
};

struct Layer {
  const RecurrentArgs& args;
  int gates, blocks, padded;     // padded: hidden, up to whole blocks
  std::vector<int64_t> offsets;  // [steps + 1]: rows before a step, where all rows of a step stand together
  float* x_gates[2];             // of the span: [rows, gates * padded]
  float* h[2][2];                // [direction][parity of the step] -> [batch, padded]
  float* c[2];                   // [batch, padded]

  int sequences(int step) const { return int(offsets[step + 1] - offsets[step]); }
  // The step of the sequence that a direction takes as its i-th, and the first step of a span [begin, end) of those.
  int step_at(int direction, int i) const { return direction == 0 ? i : args.steps - 1 - i; }
  int first_step(int direction, int begin, int end) const { return direction == 0 ? begin : args.steps - end; }
};

// A span of a direction's steps.
struct Span {
  int begin, end;
  bool own_input;  // x_gates lies part by part: [blocks of the part][rows][width], else [rows][all blocks]
  const float* x[2];
  int rows[2];
};

// Finds the rows of x in the span; gathers them where they do not stand together.
void find_input(const Layer& layer, int direction, Span& span, Scratch& gathered) {
  const RecurrentArgs& args = layer.args;
  const int k = args.direction[direction].input.k, steps = span.end - span.begin;
  const int first = layer.first_step(direction, span.begin, span.end);
  span.rows[direction] = int(layer.offsets[first + steps] - layer.offsets[first]);
  span.x[direction] = args.x + layer.offsets[first] * k;
  if (!args.batch_first || args.batch == 1) return;
  float* out = gathered.floats(int64_t(span.rows[direction]) * k);
  span.x[direction] = out;
  for (int step = first; step < first + steps; ++step)
    for (int b = 0; b < args.batch; ++b, out += k)
      std::memcpy(out, args.x + (int64_t(b) * args.steps + step) * k, size_t(k) * sizeof(float));
}

// x W_i^T + b_i for the span, of some blocks of hidden units.
void multiply_input(const Layer& layer, int direction, const Span& span, int block, int blocks, int threads) {
  const RecurrentDirection& weights = layer.args.direction[direction];
  const int width = layer.gates * kUnitBlock;
  const GemmArgs product{span.x[direction],
                         Dtype::f32,
                         weights.input.k,
                         span.rows[direction],
                         weights.input.slice(block * layer.gates, blocks * layer.gates),
                         weights.bias_input ? weights.bias_input + block * width : nullptr,
                         Activation::none,
                         layer.x_gates[direction] + int64_t(span.rows[direction]) * block * width,
                         Dtype::f32,
                         /*quantize_activations=*/true,
                         threads};
  gemm(product);
}

// The i-th step of a part, which is in the span.
void advance(const Layer& layer, const Part& part, int i, const Span& span) {
  const RecurrentArgs& args = layer.args;
  const RecurrentDirection& direction = args.direction[part.direction];
  const int step = layer.step_at(part.direction, i);
  const int rows = std::min(part.rows, layer.sequences(step) - part.row);
  if (rows <= 0) return;
  const int width = layer.gates * kUnitBlock, n = part.blocks * width;
  const int64_t state = int64_t(part.row) * layer.padded;
  const float* h = layer.h[part.direction][i % 2] + state;
  const float* bias = direction.bias_hidden ? direction.bias_hidden + part.block * width : nullptr;

  thread_local Scratch products;
  float* h_gates = products.floats(int64_t(rows) * n);
  if (i == 0 && direction.h0 == nullptr) {  // the product with zeros is the bias
    for (int r = 0; r < rows; ++r) {
      if (bias)
        std::memcpy(h_gates + int64_t(r) * n, bias, size_t(n) * sizeof(float));
      else
        std::memset(h_gates + int64_t(r) * n, 0, size_t(n) * sizeof(float));
    }
  } else {
    const GemmArgs product{h,
                           Dtype::f32,
                           layer.padded,
                           rows,
                           direction.hidden.slice(part.block * layer.gates, part.blocks * layer.gates),
                           bias,
                           Activation::none,
                           h_gates,
                           Dtype::f32,
                           /*quantize_activations=*/true,
                           /*threads=*/1};
    gemm(product);
  }

  const int unit = part.block * kUnitBlock;
  const int64_t span_row =
      layer.offsets[step] - layer.offsets[layer.first_step(part.direction, span.begin, span.end)] + part.row;
  const int64_t y_row = args.batch_first ? int64_t(part.row) * args.steps + step : layer.offsets[step] + part.row;
  const int64_t y_columns = int64_t(args.directions) * args.hidden;
  RecurrentGates gates{};
  gates.cell = args.cell;
  gates.rows = rows;
  gates.blocks = part.blocks;
  gates.columns = std::min(part.blocks * kUnitBlock, args.hidden - unit);
  if (span.own_input) {
    gates.x_stride = n;
    gates.x_gates = layer.x_gates[part.direction] + int64_t(span.rows[part.direction]) * part.block * width;
  } else {
    gates.x_stride = int64_t(layer.gates) * layer.padded;
    gates.x_gates = layer.x_gates[part.direction] + part.block * width;
  }
  gates.x_gates += span_row * gates.x_stride;
  gates.h_gates = h_gates;
  gates.h_stride = n;
  gates.h = h + unit;
  gates.h_next = layer.h[part.direction][(i + 1) % 2] + state + unit;
  if (args.cell == Cell::lstm) gates.c = layer.c[part.direction] + state + unit;
  gates.state_stride = layer.padded;
  gates.y = args.y + y_row * y_columns + int64_t(part.direction) * args.hidden + unit;
  gates.y_stride = args.batch_first ? args.steps * y_columns : y_columns;
  select_recurrent_gates(isa_in_use())(gates);
}

// How the recurrence is shared: `directions` at a time, `row_blocks` blocks of sequences each, and a barrier where
// units are shared too.
struct Sharing {
  int threads, directions, row_blocks;
  bool by_units;
};

Sharing share(const Layer& layer) {
  const RecurrentArgs& args = layer.args;
  const int64_t weight = int64_t(layer.gates) * layer.padded * args.hidden;
  const int64_t step_work = weight * args.batch * args.directions;
  const int threads = step_work * args.steps < kParallelWork ? 1 : std::max(1, args.threads);
  if (threads == 1) return {1, args.directions, 1, false};
  if (weight > kSharedWeightBytes) return {threads, 1, 1, true};
  const int wanted = divide_up(threads, args.directions), possible = std::max(1, args.batch / kLeastRows);
  const int row_blocks = std::min(wanted, possible), independent = args.directions * row_blocks;
  if (independent >= threads) return {threads, args.directions, row_blocks, false};
  if (step_work < kBarrierWork) return {independent, args.directions, row_blocks, false};
  return {threads, args.directions, row_blocks, true};
}

// The parts of one thread: units of all blocks of sequences of the directions from `first` on stand in a line, which is
// cut evenly.
std::vector<Part> parts_of(const Layer& layer, const Sharing& sharing, int first, int thread, int team) {
  const int batch = layer.args.batch, groups = sharing.directions * sharing.row_blocks;
  const int unit = sharing.by_units ? 1 : layer.blocks;
  const int64_t pieces = int64_t(groups) * layer.blocks / unit;
  const int64_t begin = pieces * thread / team * unit, end = pieces * (thread + 1) / team * unit;
  std::vector<Part> parts;
  for (int group = 0; group < groups; ++group) {
    const int64_t base = int64_t(group) * layer.blocks;
    const int from = int(std::clamp<int64_t>(begin - base, 0, layer.blocks));
    const int to = int(std::clamp<int64_t>(end - base, 0, layer.blocks));
    if (from == to) continue;
    const int rows_each = divide_up(batch, sharing.row_blocks), row = group % sharing.row_blocks * rows_each;
    parts.push_back({first + group / sharing.row_blocks, row, std::min(rows_each, batch - row), from, to - from});
  }
  return parts;
}

// What one thread of a team does in a span.
void run_span(const Layer& layer, const Sharing& sharing, const Span& span, int thread, int team) {
  const bool barriers = sharing.by_units && team > 1;
  for (int first = 0; first < layer.args.directions; first += sharing.directions) {
    const std::vector<Part> parts = parts_of(layer, sharing, first, thread, team);
    if (span.own_input)
      for (const Part& part : parts) multiply_input(layer, part.direction, span, part.block, part.blocks, 1);
    if (!barriers) {
      for (const Part& part : parts)
        for (int i = span.begin; i < span.end; ++i) advance(layer, part, i, span);
      continue;
    }
    for (int i = span.begin; i < span.end; ++i) {
      for (const Part& part : parts) advance(layer, part, i, span);
      if (i + 1 < span.end) team_barrier();
    }
  }
}

void load_state(const float* from, int rows, int columns, int padded, float* to) {
  if (from == nullptr || columns < padded) std::memset(to, 0, size_t(rows) * size_t(padded) * sizeof(float));
  if (from == nullptr) return;
  for (int r = 0; r < rows; ++r)
    std::memcpy(to + int64_t(r) * padded, from + int64_t(r) * columns, size_t(columns) * sizeof(float));
}

}  // namespace

void recurrent(const RecurrentArgs& args) {
  if (args.batch == 0 || args.steps == 0) return;
  Layer layer{args, cell_gates(args.cell), divide_up(args.hidden, kUnitBlock), 0, {}, {}, {}, {}};
  layer.padded = layer.blocks * kUnitBlock;
  layer.offsets.resize(size_t(args.steps) + 1);
  for (int step = 0; step < args.steps; ++step)
    layer.offsets[step + 1] = layer.offsets[step] + (args.batch_sizes ? args.batch_sizes[step] : args.batch);

  const int64_t row_floats = int64_t(layer.gates) * layer.padded, state = int64_t(args.batch) * layer.padded;
  const int64_t weight_bytes = row_floats * args.direction[0].input.k;
  const int64_t span_bytes = std::clamp(kSpanPerWeight * weight_bytes, kLeastSpanBytes, kMostSpanBytes);
  const int64_t span_rows = span_bytes / int64_t(sizeof(float)) / row_floats;
  const int steps_each = int(std::clamp<int64_t>(span_rows / args.batch, 1, args.steps));
  thread_local Scratch memory, gathered[2];
  float* next = memory.floats(args.directions * (steps_each * args.batch * row_floats + 3 * state));
  for (int d = 0; d < args.directions; ++d) {
    layer.x_gates[d] = next;
    next += steps_each * args.batch * row_floats;
    for (float** part : {&layer.h[d][0], &layer.h[d][1], &layer.c[d]}) {
      *part = next;
      next += state;
    }
    // Both: a sequence that the backward direction meets later than others must find its state then.
    for (float* h : layer.h[d]) load_state(args.direction[d].h0, args.batch, args.hidden, layer.padded, h);
    load_state(args.direction[d].c0, args.batch, args.hidden, layer.padded, layer.c[d]);
  }

  const Sharing sharing = share(layer);
  for (int begin = 0; begin < args.steps; begin += steps_each) {
    Span span{begin, std::min(begin + steps_each, args.steps), sharing.row_blocks == 1, {}, {}};
    for (int d = 0; d < args.directions; ++d) {
      find_input(layer, d, span, gathered[d]);
      span.own_input &= span.rows[d] <= kOwnRows;
    }
    if (!span.own_input)
      for (int d = 0; d < args.directions; ++d) multiply_input(layer, d, span, 0, layer.blocks, args.threads);
    parallel_team(sharing.threads, [&](int thread, int team) { run_span(layer, sharing, span, thread, team); });
  }

  for (int d = 0; d < args.directions; ++d) {
    const RecurrentDirection& direction = args.direction[d];
    for (int b = 0, steps = args.steps; b < args.batch; ++b) {
      while (d == 0 && layer.sequences(steps - 1) <= b) --steps;  // of this sequence; the later ones are shorter
      const size_t bytes = size_t(args.hidden) * sizeof(float);
      std::memcpy(direction.h_last + int64_t(b) * args.hidden, layer.h[d][steps % 2] + int64_t(b) * layer.padded,
                  bytes);
      if (args.cell == Cell::lstm)
        std::memcpy(direction.c_last + int64_t(b) * args.hidden, layer.c[d] + int64_t(b) * layer.padded, bytes);
    }
  }
}

}  // namespace lepton
