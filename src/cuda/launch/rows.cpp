#include "rows.h"

#include "core/shape.h"
#include "layout/copy_rows_params.cuh"
#include "sizes.h"

namespace flash_dmattn::cuda {
namespace {

const Kernel kCopyRows{"layout/copy_rows.cuh", "CopyRows"};

bool is_aligned(const View<4>& view) {
  const View<4> own = without_expand(view);
  bool aligned = view.size[3] % 8 == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && own.stride[i] % 8 == 0;
  return aligned;
}

Rows as_rows(const View<4>& view) {
  const View<4> own = without_expand(view);
  return {view.data, own.stride[0], own.stride[1], own.stride[2]};
}

Rows allocate_rows(const View<4>& view, Stream& stream) {
  const auto [batch, positions, heads, head_dim] = view.size;
  const std::int64_t head = padded_dim(head_dim), position = heads * head, whole = positions * position;
  return {stream.allocate_array<std::uint16_t>(static_cast<std::size_t>(batch * whole)), whole, position, head};
}

void copy(const Rows& from, std::int64_t from_dim, const Rows& to, std::int64_t to_dim, const View<4>& sizes,
          Stream& stream) {
  const std::int64_t rows = sizes.size[0] * sizes.size[1] * sizes.size[2];
  constexpr int per_block = CopyRowsConfig::kRowsPerBlock;
  stream.launch(kCopyRows, {static_cast<unsigned>(divide_up_wide(rows, per_block))}, CopyRowsConfig::kThreads, 0,
                CopyRowsParams{.from = from,
                               .to = to,
                               .from_dim = static_cast<int>(from_dim),
                               .to_dim = static_cast<int>(to_dim),
                               .positions = static_cast<int>(sizes.size[1]),
                               .heads = static_cast<int>(sizes.size[2]),
                               .rows = rows});
}

Rows copied_input(const View<4>& view, Stream& stream) {
  const Rows rows = allocate_rows(view, stream);
  copy(as_rows(view), view.size[3], rows, padded_dim(view.size[3]), view, stream);
  return rows;
}

}  // namespace

Rows aligned_input(const View<4>& view, Stream& stream) {
  return is_aligned(view) ? as_rows(view) : copied_input(view, stream);
}

Rows boxed_input(const View<4>& view, Stream& stream) { return boxed_input(aligned_input(view, stream), view, stream); }
Rows boxed_input(const Rows& aligned, const View<4>& view, Stream& stream) {
  return has_boxes(aligned, view) ? aligned : copied_input(view, stream);
}
bool has_boxes(const Rows& rows, const View<4>& view) {
  const i64 strides[] = {rows.batch, rows.position, rows.head};
  bool fits = true;
  for (int i = 0; i < 3; ++i) fits = fits && (view.size[i] == 1 || strides[i] > 0);
  return fits;
}
TensorBoxes boxes_of(const Rows& rows, const View<4>& view, int positions, int heads) {
  const auto size = [&](int i) { return static_cast<int>(view.size[i]); };
  return {rows, {size(0), size(1), size(2), static_cast<int>(padded_dim(view.size[3]))}, positions, heads};
}

Rows aligned_output(const View<4>& view, Stream& stream) {
  return is_aligned(view) ? as_rows(view) : allocate_rows(view, stream);
}

void write_back(const Rows& rows, const View<4>& view, Stream& stream) {
  if (rows.data != view.data) copy(rows, padded_dim(view.size[3]), as_rows(view), view.size[3], view, stream);
}

void list_rows_kernels(const Selection&, std::vector<ListedKernel>& kernels) { kernels.push_back({kCopyRows, {}}); }

}  // namespace flash_dmattn::cuda
