// activation.h - what a layer may do to its sums before they are written, as torch.nn.functional has it.
#pragma once

namespace lepton {

enum class Activation : int { none, relu, silu, gelu, gelu_tanh };
constexpr int kActivationCount = 5;

}  // namespace lepton
