// The Python module memokern._C in one translation unit: the templates of pybind11, which take longer to
// compile than what stands here, are compiled once.
#include "bind/dense.cpp"
#include "bind/isa.cpp"
#include "bind/listed.cpp"
#include "bind/module.cpp"
