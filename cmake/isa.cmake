# lepton_kernel(target source [TO_AVX2]): compile one .kernel.cpp once per instruction-set level, each in its own
# namespace. TO_AVX2: not at levels with fast products of bytes (LEPTON_KERNEL_TO_AVX2 in csrc/cpu/kernel_table.h).
# Flags are per object: nothing but .kernel.cpp files (which include no std header, see csrc/cpu/kernel_table.h) may be
# compiled above the baseline.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(LEPTON_ISAS generic ssse3 avx2 avxvnni avx512vnni avx512vbmi2 amx)
  set(LEPTON_FLAGS_generic -march=x86-64)
  set(LEPTON_FLAGS_ssse3 -march=x86-64-v2)
  set(LEPTON_FLAGS_avx2 -march=x86-64-v3)
  set(LEPTON_FLAGS_avxvnni -march=x86-64-v3 -mavxvnni)
  set(LEPTON_FLAGS_avx512vnni -march=x86-64-v4 -mavx512vnni -mprefer-vector-width=512)
  set(LEPTON_FLAGS_avx512vbmi2 ${LEPTON_FLAGS_avx512vnni} -mavx512vbmi -mavx512vbmi2 -mavx512bitalg -mavx512vpopcntdq)
  set(LEPTON_FLAGS_amx ${LEPTON_FLAGS_avx512vbmi2} -mavx512bf16 -mgfni -mamx-tile -mamx-int8 -mamx-bf16)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(LEPTON_ISAS generic neondot neoni8mm)
  set(LEPTON_FLAGS_generic -march=armv8-a)
  set(LEPTON_FLAGS_neondot -march=armv8.2-a+dotprod)
  set(LEPTON_FLAGS_neoni8mm ${LEPTON_FLAGS_neondot}+i8mm)
else()
  set(LEPTON_ISAS generic)
  set(LEPTON_FLAGS_generic "")
endif()

function(lepton_kernel target source)
  cmake_parse_arguments(PARSE_ARGV 2 KERNEL "TO_AVX2" "" "")
  get_filename_component(name ${source} NAME_WE)
  foreach(isa IN LISTS LEPTON_ISAS)
    if(KERNEL_TO_AVX2 AND isa MATCHES "avxvnni|avx512|amx|neon")
      continue()
    endif()
    string(TOUPPER ${isa} ISA)
    set(object ${name}_${isa})
    add_library(${object} OBJECT ${source})
    target_compile_definitions(${object} PRIVATE LEPTON_ISA=${isa} LEPTON_ISA_${ISA})
    # -ffp-contract=off: a fused multiply-add only where the source says so; the levels must agree to the last bit.
    target_compile_options(${object} PRIVATE ${LEPTON_FLAGS_${isa}} -ffp-contract=off -fno-math-errno -fno-exceptions
      # gcc 12 warns about its own _mm512_undefined_* (GCC bug 105593).
      -Wno-maybe-uninitialized -Wno-uninitialized)
    target_include_directories(${object} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
    set_target_properties(${object} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${object}>)
  endforeach()
endfunction()
