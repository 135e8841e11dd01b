# cmake -D ROOT=folder -D OUTPUT=file.cpp -P embed.cmake: makes all *.cuh below ROOT into C++ (cuda/jit/sources.h), so that
# the library carries the sources of its kernels.
file(GLOB_RECURSE files RELATIVE ${ROOT} ${ROOT}/*.cuh)
list(SORT files)
set(text "#include \"cuda/jit/sources.h\"\n\nnamespace flash_dmattn::cuda {\n\n")
string(APPEND text "std::span<const Source> sources() {\n  static constexpr Source kSources[] = {\n")
foreach(file IN LISTS files)
  file(READ ${ROOT}/${file} content)
  string(APPEND text "      {\"${file}\", R\"embedded(${content})embedded\"},\n")
endforeach()
string(APPEND text "  };\n  return kSources;\n}\n\n}  // namespace flash_dmattn::cuda\n")
file(WRITE ${OUTPUT} "${text}")
