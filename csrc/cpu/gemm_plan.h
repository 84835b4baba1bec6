// gemm_plan.h - the parts of a quantized product that gemm() and linear_block() put together: activations made ready,
// and a tile of rows and panels.
#pragma once

#include "cpu/gemm.h"
#include "cpu/gemm_tile.h"
#include "cpu/quantize_rows.h"
#include "cpu/scratch.h"

namespace lepton {

// Activations of a product: integers, or bf16 in tile registers.
struct Activations {
  QuantizeRowsArgs integers{};
  int k_parts = 1;  // of GemmTile

  int64_t row_bytes() const { return integers.out.planes * integers.out.stride; }
  bool in_tiles() const { return integers.out.in_tiles(); }
  // Whether they are int16 (quad_bytes in quantize_rows.h).
  bool has_pairs() const {
    const RowLayout layout = integers.out.layout;
    return layout == RowLayout::int16 || (layout == RowLayout::quads && quad_bytes(isa_in_use()) == 8);
  }
};

// Lays the prepared activations of all rows out in one scratch buffer. They are part of a product of product_rows,
// which choose the kind of numbers: the same for all parts.
Activations plan_activations(const GemmArgs& args, int product_rows, Isa isa, Scratch& scratch);

// Prepares rows [row_begin, row_end). Threads may share a block of 16 rows of the layout tiles, or two of pairs: each
// writes its own bytes.
void prepare_rows(const Activations& plan, Isa isa, int row_begin, int row_end);

// Y[rows from row0 on, columns of panels [panel_begin, panel_end)].
void multiply_tile(const Activations& plan, const GemmArgs& args, Isa isa, int row0, int rows, int panel_begin,
                   int panel_end);

}  // namespace lepton
