// Where the rows of a tile are.
#pragma once
#include "attention/scores_params.cuh"

namespace flash_dmattn::cuda {

/// Which rows a tile has. The first tiles have the longest lists: of a causal call those of the last queries.
struct Place {
  const ScoresParams& params;
  int b, unit, run, first_query;

  Place(const ScoresParams& given, int index) : Place(given, index, given.shape.units()) {}
  Place(const ScoresParams& given, int index, int units) : params(given) {
    unit = index % units;
    b = index / units % params.shape.batch;
    run = params.plan.runs.count - 1 - index / units / params.shape.batch;
    first_query = params.plan.runs.first(run);
  }
  int query_of(int row) const { return first_query + row / params.shape.pack; }
  int head_of(int row) const { return unit * params.shape.pack + row % params.shape.pack; }
  bool has(int row) const { return query_of(row) < params.plan.runs.stop(run); }
};

}  // namespace flash_dmattn::cuda
