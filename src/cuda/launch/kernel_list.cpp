#include "kernel_list.h"

#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/jit/compiler.h"
#include "flash_dmattn/cuda_kernels.h"

namespace flash_dmattn::cuda {

std::vector<ListedKernel> list_kernels(const Selection& selection) {
  std::vector<ListedKernel> listed;
  for (auto list : {list_mask_kernels, list_plan_kernels, list_rows_kernels, list_forward_kernels,
                    list_hopper_forward_kernels, list_probabilities_kernels, list_backward_kernels})
    list(selection, listed);
  // Launchers share some.
  std::vector<ListedKernel> kernels;
  std::set<std::pair<std::string, std::string>> seen;
  for (ListedKernel& kernel : listed) {
    kernel.arch = selection.arch;
    if (seen.emplace(kernel.kernel.header, kernel.kernel.name).second) kernels.push_back(std::move(kernel));
  }
  return kernels;
}

namespace {

// The pairs (option, value), (option, value) of one kernel; with an option and itself, the value alone.
using Pair = std::tuple<std::size_t, int, std::size_t, int>;

std::set<Pair> pairs_of(const std::vector<int>& options) {
  std::set<Pair> pairs;
  for (std::size_t i = 0; i < options.size(); ++i)
    for (std::size_t j = i; j < options.size(); ++j) pairs.emplace(i, options[i], j, options[j]);
  return pairs;
}

// Greedy: always the kernel that has the most pairs that none has yet, the first of them.
std::vector<ListedKernel> covering_instances(std::vector<ListedKernel> kernels) {
  std::vector<ListedKernel> chosen;
  std::set<Pair> covered;
  std::vector<std::set<Pair>> missing;
  for (const ListedKernel& kernel : kernels) missing.push_back(pairs_of(kernel.options));
  while (true) {
    std::size_t best = 0;
    for (std::size_t i = 0; i < kernels.size(); ++i) {
      std::erase_if(missing[i], [&](const Pair& pair) { return covered.contains(pair); });
      if (missing[i].size() > missing[best].size()) best = i;
    }
    if (missing[best].empty()) break;
    covered.insert(missing[best].begin(), missing[best].end());
    chosen.push_back(kernels[best]);
  }
  // A template without options has one instance.
  return chosen.empty() ? kernels : chosen;
}

}  // namespace

std::vector<ListedKernel> covering(const std::vector<ListedKernel>& kernels) {
  std::map<std::pair<std::string, std::string>, std::vector<ListedKernel>> templates;
  for (const ListedKernel& kernel : kernels) {
    const std::string& name = kernel.kernel.name;
    templates[{kernel.kernel.header, name.substr(0, name.find('<'))}].push_back(kernel);
  }
  std::vector<ListedKernel> chosen;
  for (auto& [name, instances] : templates)
    for (ListedKernel& kernel : covering_instances(std::move(instances))) chosen.push_back(std::move(kernel));
  return chosen;
}

std::vector<Target> kernels(const std::vector<std::string>& archs, const std::vector<DType>& dtypes,
                            const std::vector<std::int64_t>& head_dims, bool only_covering) {
  Selection selection{};
  for (const DType dtype : dtypes) {
    if (dtype != DType::float16 && dtype != DType::bfloat16)
      throw InvalidArgument(std::string("dtypes: has ") + name_of(dtype) + ", takes float16 and bfloat16");
    selection.dtypes.push_back(dtype == DType::float16 ? Number::float16 : Number::bfloat16);
  }
  for (const std::int64_t head_dim : head_dims) {
    if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0)
      throw InvalidArgument("head_dims: has " + std::to_string(head_dim) + ", takes multiples of 8 from 8 to 256");
    selection.head_dims.push_back(static_cast<int>(head_dim));
  }
  std::map<int, std::string> names;
  std::vector<ListedKernel> listed;
  for (const std::string& arch : archs) {
    selection.arch = arch_number(arch);
    if (!names.emplace(selection.arch, arch).second) continue;
    for (ListedKernel& kernel : list_kernels(selection)) listed.push_back(std::move(kernel));
  }
  if (only_covering) listed = covering(listed);
  std::vector<Target> targets;
  for (const ListedKernel& kernel : listed) targets.push_back({names[kernel.arch], kernel.kernel});
  return targets;
}

}  // namespace flash_dmattn::cuda
