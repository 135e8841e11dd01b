#pragma once
#include "mask/plan_params.cuh"
#include "ptx/block.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace flash_dmattn::cuda {

/// The run and the keys that a block of these kernels works on.
struct Segment {
  int b, head, run;
  i64 list;         // of those made at a time
  int index;        // of the list's segments
  int start, stop;  // keys

  explicit Segment(const BitListsParams& params) {
    const int length = params.segment;
    list = block_index() / params.segments;
    index = block_index() % params.segments;
    const i64 all = params.first_list + list, row = all / params.lists.runs.count;
    run = static_cast<int>(all % params.lists.runs.count);
    head = static_cast<int>(row % params.lists.heads);
    b = static_cast<int>(row / params.lists.heads);
    start = index * length;
    stop = least<i64>(static_cast<i64>(start) + length, params.lists.limit(run));
  }
  /// Its place in counts, and (times its length) in the other arrays.
  static i64 place(const BitListsParams& params, i64 list, int index) { return list * params.segments + index; }
};

/// Four words of memory, moved at once.
struct alignas(16) FourWords {
  u32 word[4];
};

/// Words of bits of a segment's keys, from wherever they come.
struct PackedSegment {
  using Config = BitListsConfig;
  using Params = BitListsParams;
  static constexpr int kThreads = Config::kThreads;

  const Params& params;
  const Segment segment;
  const int length, positions;
  u32* const bits;  // shared memory: words of the segment's keys, the first word of all keys first
  unsigned char* const classes;
  int* const counts;

  PackedSegment(const Params& params, char* shared)
      : params(params),
        segment(params),
        length(params.segment),
        positions(params.lists.runs.size(segment.run)),
        bits(reinterpret_cast<u32*>(shared)),
        classes(reinterpret_cast<unsigned char*>(shared + length * params.words * 4)),
        counts(reinterpret_cast<int*>(classes + length)) {}

  bool is_empty() const { return segment.start >= segment.stop; }
  int first_query() const { return params.lists.runs.first(segment.run); }

  /// Calls visit(key) for every key of the segment's length, warps at once, one that is always the same thread's. The
  /// warps have consecutive parts.
  template <class Visit>
  void for_each_key(Visit visit) const {
    const int part = length / Config::kWarps, start = thread_index() / kWarp * part;
    for (int i = thread_index() % kWarp; i < part; i += kWarp) visit(start + i);
  }

  /// The bits below n, of 32.
  static u32 below(int n) { return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1; }

  enum Class : unsigned char { empty, some, all };

  /// Applies causality and `end`, and says which keys are seen by all positions, or some.
  void classify() const {
    const int* ends = params.lists.end.row(segment.b, segment.head);
    const int first = params.lists.first(segment.run), warp = thread_index() / kWarp;
    int seen_by_all = 0, seen_by_some = 0;
    for_each_key([&](int key) {
      const int k = segment.start + key;
      const bool exists = k < segment.stop;
      // The positions from `from` to `to`, counted from the run's first, may see the key. Ends may be any numbers.
      const int from = params.lists.is_causal ? k - first : 0;
      const i64 to = ends && exists ? static_cast<i64>(ends[k * params.lists.end.key]) - first : positions;
      const int stop = exists ? static_cast<int>(least<i64>(most<i64>(to, 0), positions)) : 0;
      u32 some_bits = 0, missing = 0;
      // Most keys are visible to all positions, by causality and `end`: their whole words stay as they are.
      const bool is_visible = exists && from <= 0 && stop == positions;
      const int whole = any(!is_visible) ? 0 : positions / 32;
#pragma unroll 8
      for (int word = 0; word < whole; ++word) {
        const u32 seen = bits[word * length + key];
        some_bits |= seen;
        missing |= ~seen;
      }
#pragma unroll 1
      for (int word = whole; word < params.words; ++word) {
        u32& seen = bits[word * length + key];
        if (exists) seen &= below(stop - word * 32) & ~below(from - word * 32);
        some_bits |= exists ? seen : 0;
        missing |= below(positions - word * 32) & ~seen;
      }
      const bool is_all = exists && missing == 0, is_some = some_bits != 0 && !is_all;
      classes[key] = is_all ? all : is_some ? some : empty;
      seen_by_all += count_ones(ballot(is_all));
      seen_by_some += count_ones(ballot(is_some));
    });
    if (thread_index() % kWarp == 0) {
      counts[2 * warp] = seen_by_all;
      counts[2 * warp + 1] = seen_by_some;
    }
    sync_block();
  }

  void save() const {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    int all_at = 0, some_at = 0, all_here = 0, some_here = 0;
    for (int w = 0; w < Config::kWarps; ++w) {
      all_at += w < warp ? counts[2 * w] : 0;
      some_at += w < warp ? counts[2 * w + 1] : 0;
      all_here += counts[2 * w];
      some_here += counts[2 * w + 1];
    }
    const i64 place = Segment::place(params, segment.list, segment.index);
    if (thread_index() == 0) {
      params.counts[2 * place] = all_here;
      params.counts[2 * place + 1] = some_here;
    }
    int* const keys = params.segment_positions + place * length;
    u32* const words = params.segment_bits + place * length * params.words;
    for_each_key([&](int key) {
      const u32 is_all = ballot(classes[key] == all), is_some = ballot(classes[key] == some);
      const u32 lower = (1u << lane) - 1;
      if (is_all >> lane & 1) keys[all_at + count_ones(is_all & lower)] = segment.start + key;
      if (is_some >> lane & 1) {
        const int at = some_at + count_ones(is_some & lower);
        keys[all_here + at] = segment.start + key;
        save_bits(words + static_cast<i64>(at) * params.words, key);
      }
      all_at += count_ones(is_all);
      some_at += count_ones(is_some);
    });
  }

  void save_bits(u32* to, int key) const {
    if (params.words % 4 == 0) {
      for (int word = 0; word < params.words; word += 4) {
        const u32* from = bits + word * length + key;
        *reinterpret_cast<FourWords*>(to + word) = {{from[0], from[length], from[2 * length], from[3 * length]}};
      }
    } else {
      for (int word = 0; word < params.words; ++word) to[word] = bits[word * length + key];
    }
  }
};

/// From the mask's bytes, whose bits it saves where there is a place for them.
struct PackMask : PackedSegment {
  static constexpr int kBlocksPerMultiprocessor = 2;

  const unsigned char* const mask;  // of the run's first query

  PackMask(const Params& params, char* shared)
      : PackedSegment(params, shared),
        mask(params.mask.row(segment.b, segment.head) + first_query() * params.mask.query) {}

  static void run(const Params& params, char* shared) {
    const PackMask block(params, shared);
    if (block.is_empty()) return;
    block.pack();
    sync_block();
    block.save_mask();
    block.classify();
    block.save();
  }

  /// What is left of the mask's bytes once keys after a position are gone: the first key that position i does not see.
  int limit(int i) const {
    return params.lists.is_causal ? params.lists.first(segment.run) + i + 1 : params.lists.key_len;
  }

  void pack() const {
    const int strips = length / Config::kStrip;
    for (int item = thread_index() / kWarp; item < strips * params.words; item += Config::kWarps) {
      const int word = item % params.words, strip = item / params.words * Config::kStrip;
      if (segment.start + strip >= segment.stop) continue;
      if (params.is_aligned)
        pack_aligned(word, strip);
      else
        pack_any(word, strip);
    }
  }

  /// Every byte that is not 0 becomes 0x80.
  static u32 top_bits(u32 x) { return (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) & 0x80808080u; }

  /// 16 keys of each thread at 32 positions.
  void pack_aligned(int word, int strip) const {
    const int key = strip + thread_index() % kWarp * 16, first_key = segment.start + key;
    const int first = word * 32, stop = first_key < params.lists.key_len ? least(first + 32, positions) : 0;
    const unsigned char* from = mask + first_key + first * params.mask.query;
    // A byte of part[e][j] has what key 4 j + (the byte's number) is at positions 8 e ... 8 e + 7.
    u32 part[4][4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      FourWords rows[8];
      for (int i = 0; i < 8; ++i) {
        const int position = first + e * 8 + i;
        const bool is_read = position < stop && first_key < limit(position);
        rows[i] = is_read ? *reinterpret_cast<const FourWords*>(from + (e * 8 + i) * params.mask.query)
                          : FourWords{{0, 0, 0, 0}};
      }
      for (int j = 0; j < 4; ++j) {
        part[e][j] = 0;
        for (int i = 0; i < 8; ++i) part[e][j] |= top_bits(rows[i].word[j]) >> (7 - i);
      }
    }
    u32* const to = bits + word * length + key;
    for (int j = 0; j < 4; ++j) {
      FourWords keys;
      for (int i = 0; i < 4; ++i)
        keys.word[i] = (part[0][j] >> (8 * i) & 0xff) | (part[1][j] >> (8 * i) & 0xff) << 8 |
                       (part[2][j] >> (8 * i) & 0xff) << 16 | (part[3][j] >> (8 * i) & 0xff) << 24;
      *reinterpret_cast<FourWords*>(to + 4 * j) = keys;
    }
  }

  void pack_any(int word, int strip) const {
    const int first = word * 32, stop = least(first + 32, positions);
    for (int i = 0; i < Config::kStrip; i += kWarp) {
      const int key = strip + i + thread_index() % kWarp, k = segment.start + key;
      const unsigned char* from = mask + k * params.mask.key + first * params.mask.query;
      u32 seen = 0;
#pragma unroll 8
      for (int row = 0; row < 32; ++row) {
        const bool is_read = first + row < stop && k < segment.stop && k < limit(first + row);
        seen |= static_cast<u32>(is_read && from[row * params.mask.query] != 0) << row;
      }
      bits[word * length + key] = seen;
    }
  }

  /// The words as they are before classify, by the threads that change them there. Where runs share words, these are
  /// zeros at first, and bits are set. Of keys that causality hides from the whole run, nothing is written.
  void save_mask() const {
    const Masking<u32>& saved = params.saved;
    if (!saved.data || !saved.is_first_of_row(segment.b, segment.head)) return;
    const int shift = first_query() % 32;
    u32* const first_word = saved.row(segment.b, segment.head) + first_query() / 32 * saved.query + segment.start;
    for_each_key([&](int key) {
      if (segment.start + key >= segment.stop) return;
      for (int word = 0; word * 32 < positions; ++word) {
        const u32 seen = bits[word * length + key];
        u32* const to = first_word + word * saved.query + key;
        if (params.runs_have_whole_words()) {
          *to = seen;
        } else {
          const u64 shifted = static_cast<u64>(seen) << shift;
          const u32 low = static_cast<u32>(shifted), high = static_cast<u32>(shifted >> 32);
          if (low != 0) or_into(to, low);
          if (high != 0) or_into(to + saved.query, high);
        }
      }
    });
  }
};

/// From the words that a PackMask saved, whatever its runs were.
struct PackSavedMask : PackedSegment {
  static constexpr int kBlocksPerMultiprocessor = 3;
  static constexpr int kWords = 8;          // of each of a thread's four keys, on their way at a time
  static constexpr int kStrip = 4 * kWarp;  // keys of a warp

  const u32* const saved;  // of the segment's first key
  const int saved_stop;    // words

  PackSavedMask(const Params& params, char* shared)
      : PackedSegment(params, shared),
        saved(params.saved.row(segment.b, segment.head) + segment.start),
        saved_stop(divide_up(params.lists.runs.stop(segment.run), 32)) {}

  static void run(const Params& params, char* shared) {
    const PackSavedMask block(params, shared);
    if (block.is_empty()) return;
    if (params.is_aligned)
      block.pack<true>();
    else
      block.pack<false>();
    sync_block();
    block.classify();
    block.save();
  }

  /// How many of the segment's keys have a saved word: of those that causality hides, nobody may have written one.
  int keys_of(int word) const {
    const ListsParams& lists = params.lists;
    const int stop = lists.is_causal ? least(lists.first_position() + 32 * word + 32, segment.stop) : segment.stop;
    return word < saved_stop ? stop - segment.start : 0;
  }

  template <bool kAligned>
  void pack() const {
    const int strips = length / kStrip, groups = divide_up(params.words, kWords);
    const int first = first_query() / 32, shift = first_query() % 32;
    for (int item = thread_index() / kWarp; item < strips * groups; item += Config::kWarps) {
      const int word = item / strips * kWords, strip = item % strips * kStrip;
      if (segment.start + strip >= segment.stop) continue;
      // Where a run begins inside a saved word, a word of its own is made of two.
      FourWords parts[kWords + 1];
#pragma unroll
      for (int i = 0; i <= kWords; ++i) {
        const int at = first + word + i;
        parts[i] = load<kAligned>(saved + at * params.saved.query, strip, i < kWords || shift != 0 ? keys_of(at) : 0);
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (word + i >= params.words) break;
        FourWords keys;
        for (int j = 0; j < 4; ++j)
          keys.word[j] = static_cast<u32>((static_cast<u64>(parts[i + 1].word[j]) << 32 | parts[i].word[j]) >> shift);
        // The length, written so that the compiler sees 16 bytes that it can store at once.
        store<kAligned>(keys, bits + (word + i) * (strips * kStrip), strip);
      }
    }
  }

  /// A thread's four keys of a strip are neighbours, or a warp's width apart.
  template <bool kAligned>
  static FourWords load(const u32* from, int strip, int stop) {
    const int lane = thread_index() % kWarp;
    FourWords keys{{0, 0, 0, 0}};
    if constexpr (kAligned) {
      if (strip + 4 * lane < stop) keys = *reinterpret_cast<const FourWords*>(from + strip + 4 * lane);
    } else {
      for (int j = 0; j < 4; ++j)
        if (strip + lane + kWarp * j < stop) keys.word[j] = from[strip + lane + kWarp * j];
    }
    return keys;
  }
  template <bool kAligned>
  static void store(const FourWords& keys, u32* to, int strip) {
    const int lane = thread_index() % kWarp;
    if constexpr (kAligned)
      *reinterpret_cast<FourWords*>(to + strip + 4 * lane) = keys;
    else
      for (int j = 0; j < 4; ++j) to[strip + lane + kWarp * j] = keys.word[j];
  }
};

struct BitLists {
  using Config = BitListsConfig;
  using Params = BitListsParams;
  static constexpr int kThreads = Config::kThreads, kBlocksPerMultiprocessor = 4;

  static void run(const Params& params, char*) {
    const Segment segment(params);
    const ListsParams& lists = params.lists;
    const int length = params.segment, filled = divide_up(lists.limit(segment.run), length);
    if (segment.index > 0 && segment.index >= filled) return;
    // Every warp adds up the counts of all segments.
    int all = 0, some = 0, all_before = 0, some_before = 0;
    for (int i = thread_index() % kWarp; i < filled; i += kWarp) {
      const int* counts = params.counts + 2 * Segment::place(params, segment.list, i);
      all += counts[0];
      some += counts[1];
      all_before += i < segment.index ? counts[0] : 0;
      some_before += i < segment.index ? counts[1] : 0;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      all += shuffle_xor(all, mask);
      some += shuffle_xor(some, mask);
      all_before += shuffle_xor(all_before, mask);
      some_before += shuffle_xor(some_before, mask);
    }
    const i64 row = static_cast<i64>(segment.b) * lists.heads + segment.head;
    const i64 offset = row * params.room.start(lists.runs.count) + params.room.start(segment.run);
    if (segment.index == 0) {
      for (int copy = thread_index(); copy < lists.copies; copy += kThreads)
        lists.at(segment.b, segment.head, copy, segment.run) = {offset, all + some, all};
      // Keys that every position sees have bits where they share a tile with others.
      const i64 tested = offset + most(all - Config::kMostTileKeys, 0);
      for (i64 i = tested * params.words + thread_index(); i < (offset + all) * params.words; i += kThreads)
        params.bits[i] = ~0u;
    }
    if (filled == 0) return;

    const i64 place = Segment::place(params, segment.list, segment.index);
    const int all_here = params.counts[2 * place], some_here = params.counts[2 * place + 1];
    const int* keys = params.segment_positions + place * length;
    int* const all_keys = lists.positions + offset + all_before;
    int* const some_keys = lists.positions + offset + all + some_before;
    for (int i = thread_index(); i < all_here; i += kThreads) all_keys[i] = keys[i];
    for (int i = thread_index(); i < some_here; i += kThreads) some_keys[i] = keys[all_here + i];
    const u32* from = params.segment_bits + place * length * params.words;
    u32* to = params.bits + (offset + all + some_before) * params.words;
    if (params.words % 4 == 0)
      copy_array(reinterpret_cast<const FourWords*>(from), reinterpret_cast<FourWords*>(to),
                 some_here * (params.words / 4));
    else
      copy_array(from, to, some_here * params.words);
  }

  template <class T>
  static void copy_array(const T* from, T* to, int count) {
#pragma unroll 4
    for (int i = thread_index(); i < count; i += kThreads) to[i] = from[i];
  }
};

}  // namespace flash_dmattn::cuda
