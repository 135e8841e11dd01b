# The operators, flash_dmattn/_C.so: on PyTorch's stable ABI and without Python, so that one build serves every CPython and
# every torch from 2.10. torch is found without importing it: only its headers and the name of its library are needed.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "from importlib.util import find_spec; print(find_spec('torch').submodule_search_locations[0], end='')"
  OUTPUT_VARIABLE torch_dir RESULT_VARIABLE no_torch ERROR_QUIET)
if(no_torch)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no torch: install torch >= 2.10 there, or build with build isolation")
endif()

file(GLOB torch_sources CONFIGURE_DEPENDS src/torch/*.cpp)
add_library(_C MODULE ${torch_sources})
target_include_directories(_C SYSTEM PRIVATE ${torch_dir}/include)
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_libraries(_C PRIVATE flash_dmattn_engine ${torch_dir}/lib/libtorch_cpu.so)
target_link_options(_C PRIVATE -Wl,--no-undefined -Wl,--exclude-libs,ALL)
# No rpath: the torch that has been imported by then is the one that is used.
set_target_properties(_C PROPERTIES PREFIX "" SUFFIX .so SKIP_BUILD_RPATH ON)
install(TARGETS _C LIBRARY DESTINATION flash_dmattn COMPONENT python)
