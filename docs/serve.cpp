// serve TASK.pt2: a line of item ids (oldest first) in, a line of the task's outputs out, after the last line.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: serve TASK.pt2 < histories\n";
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[1]);

  std::vector<std::vector<int64_t>> histories;
  size_t longest = 1;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::vector<int64_t> ids;
    for (int64_t id; words >> id;) ids.push_back(id);
    longest = std::max(longest, ids.size());
    histories.push_back(ids);
  }
  const int64_t users = histories.size(), length = longest;
  at::Tensor items = at::zeros({users, length}, at::kLong);  // 0 is no event
  for (int64_t u = 0; u < users; ++u)
    std::copy(histories[u].begin(), histories[u].end(), items[u].data_ptr<int64_t>());

  const at::Tensor output = model.run({items})[0].reshape({users, -1}).contiguous();
  for (int64_t u = 0; u < users; ++u)
    for (int64_t c = 0; c < output.size(1); ++c)
      std::printf("%.9g%c", output[u][c].item<float>(), c + 1 < output.size(1) ? ' ' : '\n');
  return 0;
}
