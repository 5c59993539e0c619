// Constants that the kernels and Python must agree on. The binding exports them as attributes of memokern._C
// and Python reads them there, so that each has one home.
#pragma once
#include <stdint.h>

namespace memokern {

// How the numbers of a row are stored.
enum RowType : int { kF64 = 0, kF32 = 1, kBF16 = 2, kF16 = 3, kU8 = 4 };

// How a row's squared distance becomes its logit; `Query` in memokern/calls/arguments.py has the formulas.
enum Weighting : int { kGaussian = 0, kLog = 1 };

struct NamedCode {
  const char* name;
  int code;
};

// The names are those of torch's types.
static constexpr NamedCode kRowTypes[] = {
    {"float64", kF64}, {"float32", kF32}, {"bfloat16", kBF16}, {"float16", kF16}, {"uint8", kU8}};
static constexpr NamedCode kWeightings[] = {{"gaussian", kGaussian}, {"log", kLog}};

// The cosine projection pads the columns of a box to a multiple of this, which every vector's width divides.
static constexpr int kProjectionSide = 16;

// An index has at most so many levels: the slack of a scan (cpu/scan/bounds-inl.h) pays for the rounding of
// as many.
static constexpr int kMostLevels = 16;

// The blocks of an index (memokern/index/blocks.py): rows of a block; blocks of a panel, whose boxes lie side
// by side; leading coordinates that a box bounds one by one.
static constexpr int kBlockRows = 24, kPanelBlocks = 16, kBoxCoordinates = 16;

}  // namespace memokern
