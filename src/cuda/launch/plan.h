// The plan of a problem, made on the device.
#pragma once
#include <optional>

#include "flash_dmattn/attention.h"
#include "flash_dmattn/cuda.h"
#include "plan.cuh"
#include "problem.cuh"

namespace flash_dmattn::cuda {

/// How the query heads of a problem are packed into tiles of at most `rows` rows: the most heads that divide H / Hk,
/// fit, and share a mask and (where it is the same for all queries) a bias.
Shape make_shape(const Problem& problem, int rows);

/// BiasKind::per_key wherever the bias is the same for all queries; make_shape packs accordingly.
BiasKind bias_kind(const Problem& problem);
Bias make_bias(const Problem& problem);  ///< only where there is one
Test test_of(const Problem& problem);    ///< bits where the mask has a value for each pair

struct MadePlan {
  Plan plan;
  std::int64_t longest;  ///< no list is longer: what is known without asking the device
};

/// The bits of a mask with a value for each pair (Output::mask_bits): to write down for later, or to read in its place.
struct MaskBits {
  std::optional<View<4>> to_save = {}, saved = {};
};

/// A list for every run of queries, in memory of `stream`.
MadePlan make_plan(const Problem& problem, const Shape& shape, const Runs& runs, Stream& stream,
                   const MaskBits& mask_bits = {});

}  // namespace flash_dmattn::cuda
