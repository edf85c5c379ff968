# cmake -DNM=... -DOBJECTS=a.o;b.o -P isa_symbols.cmake
# Code of one instruction set may define nothing outside its own namespace that the linker would share with the others.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --defined-only -C ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [Wu] [^\n]*" shared "${symbols}")
  foreach(symbol IN LISTS shared)
    if(NOT symbol MATCHES "uvg::(generic|neon|neon_bf16|avx2|avx512|avx512_bf16)::")
      message(SEND_ERROR "${object}: ${symbol}")
    endif()
  endforeach()
endforeach()
