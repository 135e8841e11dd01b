// FNV-1a of 128 bits: names and checks cached kernels. It need not withstand attackers: whoever writes to the folder
// can as well write a kernel.
#pragma once
#include <string>
#include <string_view>

namespace flash_dmattn::cuda {

class Hash {
 public:
  /// The length goes in, too: "ab", "c" is not "a", "bc".
  Hash& add(std::string_view bytes) {
    for (const char byte : bytes) add_byte(static_cast<unsigned char>(byte));
    for (std::size_t length = bytes.size(), i = 0; i < 8; ++i, length >>= 8) add_byte(length & 0xff);
    return *this;
  }
  /// 32 hexadecimal digits.
  std::string text() const {
    std::string text;
    for (int shift = 124; shift >= 0; shift -= 4) text += "0123456789abcdef"[static_cast<int>(value_ >> shift) & 15];
    return text;
  }

 private:
  using Value = unsigned __int128;
  static constexpr Value join(unsigned long long high, unsigned long long low) { return Value{high} << 64 | low; }
  void add_byte(unsigned byte) { value_ = (value_ ^ byte) * join(0x0000000001000000, 0x000000000000013B); }

  Value value_ = join(0x6c62272e07bb0142, 0x62b821756295c58d);
};

}  // namespace flash_dmattn::cuda
