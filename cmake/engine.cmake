# The engine: a static library without dependencies, installed as the CMake package flash_dmattn.
include(CheckCXXCompilerFlag)
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
find_package(Threads REQUIRED)

file(GLOB engine_sources CONFIGURE_DEPENDS
  src/core/*.cpp src/cpu/*.cpp src/cuda/*.cpp src/cuda/jit/*.cpp src/cuda/launch/*.cpp)
add_library(flash_dmattn_engine STATIC ${engine_sources} ${PROJECT_BINARY_DIR}/cuda_sources.cpp)
add_library(flash_dmattn::engine ALIAS flash_dmattn_engine)
target_include_directories(flash_dmattn_engine
  PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
  PRIVATE src src/cuda/kernels src/cuda/launch)
target_compile_features(flash_dmattn_engine PUBLIC cxx_std_20)
target_link_libraries(flash_dmattn_engine PUBLIC Threads::Threads PRIVATE ${CMAKE_DL_LIBS})
set_target_properties(flash_dmattn_engine PROPERTIES EXPORT_NAME engine)

# CUDA kernels are compiled at run time; the library carries their sources.
file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS src/cuda/kernels/*.cuh)
add_custom_command(OUTPUT ${PROJECT_BINARY_DIR}/cuda_sources.cpp
  COMMAND ${CMAKE_COMMAND} -D ROOT=${PROJECT_SOURCE_DIR}/src/cuda/kernels -D OUTPUT=${PROJECT_BINARY_DIR}/cuda_sources.cpp
    -P ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
  DEPENDS ${cuda_sources} cmake/embed.cmake VERBATIM)

# The kernels are compiled once for each instruction set; the engine chooses among them at run time. A compiler too old for
# one leaves it out.
set(FLASH_DMATTN_INSTRUCTION_SETS)
function(flash_dmattn_add_instruction_set name)
  string(TOUPPER ${name} NAME)
  list(JOIN ARGN " " flags)
  set(CMAKE_REQUIRED_QUIET ON)
  check_cxx_compiler_flag("${flags}" FLASH_DMATTN_HAS_${NAME})
  if(NOT FLASH_DMATTN_HAS_${NAME})
    message(STATUS "Kernels for ${name} are left out: the compiler does not know ${flags}")
    return()
  endif()
  target_compile_definitions(flash_dmattn_engine PRIVATE FLASH_DMATTN_HAS_${NAME})
  target_sources(flash_dmattn_engine PRIVATE src/cpu/isa/${name}.cpp)
  set_source_files_properties(src/cpu/isa/${name}.cpp PROPERTIES COMPILE_OPTIONS "${ARGN}")
  set(FLASH_DMATTN_INSTRUCTION_SETS ${FLASH_DMATTN_INSTRUCTION_SETS} ${name} PARENT_SCOPE)
endfunction()

flash_dmattn_add_instruction_set(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -mlzcnt)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  set(avx512_bf16 ${avx512} -mavx512bf16)
  set(amx ${avx512_bf16} -mamx-tile -mamx-bf16)
  foreach(name avx2 avx512 avx512_bf16 amx)
    flash_dmattn_add_instruction_set(${name} ${${name}})
  endforeach()
endif()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flash_dmattn)
file(WRITE ${PROJECT_BINARY_DIR}/flash_dmattn-config.cmake
"include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(\${CMAKE_CURRENT_LIST_DIR}/flash_dmattn-targets.cmake)
")
write_basic_package_version_file(${PROJECT_BINARY_DIR}/flash_dmattn-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(TARGETS flash_dmattn_engine EXPORT flash_dmattn-targets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT engine)
install(DIRECTORY include/flash_dmattn DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT engine)
install(EXPORT flash_dmattn-targets NAMESPACE flash_dmattn:: DESTINATION ${package_dir} COMPONENT engine)
install(FILES ${PROJECT_BINARY_DIR}/flash_dmattn-config.cmake ${PROJECT_BINARY_DIR}/flash_dmattn-config-version.cmake
  DESTINATION ${package_dir} COMPONENT engine)
