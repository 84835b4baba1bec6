// recurrent_gates.h - the element-wise part of a recurrent step: from the two products to the new state.
#pragma once

#include <stdint.h>

#include "cpu/kernel_table.h"
#include "cpu/recurrent.h"

namespace lepton {

// All rows have `blocks` blocks of 16 units; products are [blocks][gates][16], states [blocks][16].
struct RecurrentGates {
  Cell cell;
  int rows, blocks;
  int columns;           // of y: 16 * blocks, or less where the last block is partial
  const float* x_gates;  // x W_i^T + b_i
  int64_t x_stride;      // strides: elements between rows
  const float* h_gates;  // h W_h^T + b_h
  int64_t h_stride;
  const float* h;        // the state before, of a GRU
  float* h_next;         // and after; not the same memory: other threads still read h
  float* c;              // LSTM only, updated in place
  int64_t state_stride;  // of h, h_next and c
  float* y;              // a second copy of h_next, without the padding
  int64_t y_stride;
};

using RecurrentGatesFn = void(const RecurrentGates&);
LEPTON_KERNEL(recurrent_gates, RecurrentGatesFn)

}  // namespace lepton
