# csrc/cuda, twice: by nvcc into the Python module _cuda, and by the C++ compiler into _cuda_sim, which tests use.
file(GLOB UVG_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)

# nvcc is called by hand: CMake's own CUDA support wants a whole toolkit, and PyPI's wheels are not one.
if(UVG_PYTHON AND UVG_NVCC)
  execute_process(COMMAND ${UVG_NVCC} --dryrun -x cu -c /dev/null -o /dev/null ERROR_VARIABLE dryrun)
  string(REGEX MATCH "_HERE_=([^\n]+)" found "${dryrun}")  # UVG_NVCC may be a script that calls one elsewhere
  get_filename_component(UVG_CUDA_ROOT ${CMAKE_MATCH_1} DIRECTORY)
  unset(UVG_CUDART CACHE)
  find_library(UVG_CUDART cudart_static PATHS ${UVG_CUDA_ROOT} PATH_SUFFIXES lib64 lib NO_DEFAULT_PATH REQUIRED)
  find_package(Threads REQUIRED)
  execute_process(COMMAND ${UVG_NVCC} --version OUTPUT_VARIABLE UVG_NVCC_VERSION)
  string(REGEX MATCH "release [0-9.]+" UVG_NVCC_VERSION "${UVG_NVCC_VERSION}")

  set(flags -std=c++17 -O3 -Xfatbin=-compress-all -Xcompiler=-fPIC,-fvisibility=hidden,-Wno-psabi -Xptxas=--warn-on-spills
            -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/csrc/include)
  if(UVG_WERROR)  # another nvcc than ours may spill: that costs time, and is no reason to fail an install
    list(APPEND flags -Xptxas=-Werror)
  endif()
  foreach(arch IN LISTS UVG_CUDA_ARCHS)
    list(APPEND flags -gencode=arch=compute_${arch},code=sm_${arch})
  endforeach()
  list(GET UVG_CUDA_ARCHS -1 newest)
  list(APPEND flags -gencode=arch=compute_${newest},code=compute_${newest})
  set(objects "")
  foreach(source IN LISTS UVG_CUDA_SOURCES)
    get_filename_component(name ${source} NAME_WE)
    set(object ${PROJECT_BINARY_DIR}/cuda/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${PROJECT_BINARY_DIR}/cuda
      COMMAND ${UVG_NVCC} ${flags} -MD -MF ${object}.d -c ${source} -o ${object}
      DEPENDS ${source} DEPFILE ${object}.d
      COMMENT "nvcc ${name}.cu"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  list(JOIN UVG_CUDA_ARCHS "," archs)
  pybind11_add_module(_cuda MODULE csrc/bindings_cuda.cpp ${objects})
  target_compile_definitions(_cuda PRIVATE UVG_VERSION="${UVG_VERSION}" UVG_NVCC="nvcc ${UVG_NVCC_VERSION}"
                                           UVG_ARCHS="${archs}")
  target_link_libraries(_cuda PRIVATE uvg_options ${UVG_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
endif()

if(UVG_TESTS)
  file(GLOB UVG_SIM_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/sim/*.cpp)
  add_library(uvg_sim STATIC ${UVG_SIM_SOURCES})
  set_target_properties(uvg_sim PROPERTIES CXX_STANDARD 20)
  target_link_libraries(uvg_sim PUBLIC uvg_options)
  target_compile_definitions(uvg_sim PUBLIC UVG_SIMULATE=1)
  target_compile_options(uvg_sim PUBLIC -Wno-unknown-pragmas -fmacro-prefix-map=${PROJECT_SOURCE_DIR}/=)

  add_library(test_sim_objects OBJECT csrc/sim/tests/test_sim.cpp)
  set_target_properties(test_sim_objects PROPERTIES CXX_STANDARD 20)
  target_link_libraries(test_sim_objects PRIVATE uvg_sim)
  add_executable(test_sim $<TARGET_OBJECTS:test_sim_objects>)
  add_executable(test_sim_ucontext $<TARGET_OBJECTS:test_sim_objects> csrc/sim/fiber.cpp)  # in place of the library's
  target_compile_definitions(test_sim_ucontext PRIVATE UVG_SIM_UCONTEXT=1)
  foreach(name test_sim test_sim_ucontext)
    target_link_libraries(${name} PRIVATE uvg_sim)
    add_test(NAME ${name} COMMAND ${name})
  endforeach()
  if(UVG_PYTHON)
    set_source_files_properties(${UVG_CUDA_SOURCES} PROPERTIES LANGUAGE CXX)
    pybind11_add_module(_cuda_sim MODULE csrc/bindings_cuda.cpp ${UVG_CUDA_SOURCES})
    set_target_properties(_cuda_sim PROPERTIES CXX_STANDARD 20 LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR})
    target_link_libraries(_cuda_sim PRIVATE uvg_sim)
  endif()
endif()
