// recurrent.h - one layer of an LSTM, a GRU or a plain RNN over a sequence, with int8 weights and activations quantized
// on the fly, on the CPU.
//
//   LSTM  i, f, o = sigmoid, g = tanh of (x W_i^T + b_i) + (h W_h^T + b_h);  c = f * c + i * g,  h = o * tanh(c)
//   GRU   r, z = sigmoid of the same sum, n = tanh((x W_in^T + b_in) + r * (h W_hn^T + b_hn));  h = n + z * (h - n)
//   RNN   h = tanh, or max(0, .), of the same sum
//
// x W_i^T of a span of time steps is one product; only h W_h^T has to wait for the step before. The rows of both
// weights stand in blocks of 16 hidden units, the gates of a block together: [hidden / 16][gates][16], zeros past
// `hidden`. So a thread that has some units has consecutive panels of the weight, and one vector of each gate.
#pragma once

#include <stdint.h>

#include "cpu/packed_weight.h"

namespace lepton {

enum class Cell : int { lstm, gru, rnn_tanh, rnn_relu };

constexpr int cell_gates(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

constexpr int kUnitBlock = kPanel;  // hidden units in a block: the columns of a panel

// One direction of a layer. The states are [batch, hidden], rows contiguous.
struct RecurrentDirection {
  PackedWeight input;        // 8 bit, n = gates * hidden rounded up to 16, k = the layer's input
  PackedWeight hidden;       // 8 bit, the same n, k = hidden
  const float* bias_input;   // [n] in the order of the weights' rows, or null
  const float* bias_hidden;  // [n] or null
  const float* h0;           // or null for zeros
  const float* c0;           // LSTM only
  float* h_last;
  float* c_last;  // LSTM only
};

struct RecurrentArgs {
  Cell cell;
  const float* x;  // [rows, k], rows contiguous; which row is which, the next three say
  int steps, batch;
  bool batch_first;            // row = sequence * steps + step, else step * batch + sequence
  const int64_t* batch_sizes;  // [steps], falling: sequences that are still there, their rows packed; or null for all
  int hidden;
  int directions;  // 1, or 2: the second one runs from the end
  RecurrentDirection direction[2];
  float* y;  // [rows, directions * hidden]
  int threads;
};

void recurrent(const RecurrentArgs& args);

}  // namespace lepton
