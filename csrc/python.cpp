// The Python module: importing it registers the operators (library.cpp), and it can say how it was built.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of singe, reached through singe.ops";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = SINGE_TORCH;
    info["compiler"] = SINGE_COMPILER;
    info["cuda"] = SINGE_CUDA;  // version of the CUDA compiler, empty without CUDA kernels
    info["architectures"] = SINGE_ARCHITECTURES;
    return info;
  });
}
